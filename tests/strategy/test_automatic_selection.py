"""Experts that are chosen at set-up: by all ranks' batches, sharded or not, and resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from strategy import automatic_selection_runs as runs
from strategy.models import Case, build_net

from lightning_fastmoe import select_experts


def chosen_alone(case: Case, by: str, number: int, **options) -> dict[str, list[int]]:
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    batches = runs.all_batches(case, number)
    found = select_experts(net, batches, by, run=runs.run(net), **options)
    return {f"net.{name}": ids for name, ids in found.items()}


@pytest.mark.parametrize(
    ("ep", "stage", "late", "by"),
    [(4, 1, True, "load"), (2, 3, False, "gate"), (1, 2, True, "gate")],
)
def test_trains_what_one_process_would_choose(ep, stage, late, by, rank_pool) -> None:
    case = Case(4, ep, stage, num_experts=(4, 8), in_configure_model=late)
    named = chosen_alone(case, by, 2, budget=4)
    experts, options = f"by_{by}", {"batches": 2, "budget": 4}
    # Named experts of a model of configure_model would have to be applied there.
    expected = rank_pool.run(runs.train, 4, replace(case, in_configure_model=False), named)
    found = rank_pool.run(_train_with, 4, case, experts, options)
    for (chosen, weights, losses), (_, wanted, their_losses) in zip(found, expected, strict=True):
        assert chosen == named
        assert losses == their_losses
        for name, value in weights[-1].items():
            assert torch.equal(value, wanted[-1][name]), name


def _train_with(case, experts, options, load=None, save=None, kind="net"):
    return runs.train(case, experts, load, save, kind, **options)


def _error_with(case, experts, options, load=None, kind="net"):
    return runs.error_of(case, experts, load, None, kind, **options)


def test_resumes_with_the_selection_of_the_checkpoint(rank_pool, tmp_path) -> None:
    path = str(tmp_path / "saved")
    case = Case(2, 2, 3, num_experts=(4, 8), steps=6, batches_per_epoch=2)
    options = {"batches": 2, "share": 0.3}
    chosen, *_ = rank_pool.run(_train_with, 2, case, "by_load", options, None, path)[0]
    case = replace(case, epochs=2)
    whole = rank_pool.run(_train_with, 2, case, "by_load", options)[0]
    # By another measure of other data, which would choose others.
    other = {"batches": 1, "budget": 1}
    resumed = rank_pool.run(_train_with, 2, case, "by_gate", other, path)[0]
    assert resumed[0] == whole[0] == chosen
    for name, value in whole[1][-1].items():
        assert torch.equal(resumed[1][-1][name], value), name


def test_ranks_with_fewer_batches_and_errors_on_one(rank_pool) -> None:
    case = Case(2, 2, 2, num_experts=(4, 8), steps=2)
    options = {"batches": 8, "share": 0.3}
    short = rank_pool.run(_train_with, 2, case, "by_load", options, None, None, "short")
    assert short[0][0] == chosen_alone(case, "load", 1, share=0.3)
    broken = rank_pool.run(_error_with, 2, case, "by_load", options, None, "broken")
    assert broken[0] == "DataError: Rank 1 could not take batches: OSError: no such file"
    assert broken[1] == "OSError: no such file"
    failed = rank_pool.run(_error_with, 2, case, "by_load", options, None, "no step")
    assert failed[1] == "ValueError: a bad batch"
    assert "rank 1 has left the run with ValueError: a bad batch" in failed[0]
