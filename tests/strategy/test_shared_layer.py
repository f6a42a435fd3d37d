"""A MoE layer used at two depths trains, saves and resumes on any ranks, as any tied weights do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy import shared_layer_runs as runs
from strategy.models import Case

from lightning_fastmoe.checkpoint.whole import read_whole

CASE = Case(2, 2, num_experts=(4,), steps=4, batches_per_epoch=2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_on_other_ranks(stage: int, rank_pool, tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    case = replace(CASE, stage=stage)
    norms, saved = rank_pool.run(runs.train, 2, case, None, path)[0]
    assert norms[0] > 0
    state = read_whole(Path(path))["state_dict"]
    for name, value in saved.items():
        assert torch.equal(state[f"net.{name}"], value), name
        if name.startswith("moes.0."):
            assert state[f"net.moes.1.{name[7:]}"] is state[f"net.{name}"]
    case = replace(case, epochs=2)
    (_, same), *_ = rank_pool.run(runs.train, 2, case, path, None)
    ((_, alone),) = rank_pool.run(runs.train, 1, replace(case, world=1, ep=1), path, None)
    for name, value in saved.items():
        for after in (same, alone):
            # Adam's steps are of the size of the learning rate: neither lost nor misplaced.
            assert 0 < float((after[name] - value).abs().max()) < 0.1, name


@pytest.mark.parametrize("ep", [1, 2])
def test_layers_that_share_parameters_are_refused_where_they_are_sharded(
    ep: int, rank_pool
) -> None:
    """Each would keep its own rows, and they would come apart."""
    case = replace(CASE, ep=ep, num_experts=(4, 4))
    for said in rank_pool.run(runs.shares_parameters, 2, case):
        assert (said is None) is (ep == 1)
        assert ep == 1 or "'net.moes.0' and 'net.moes.1' share parameters" in said
