"""SparseUpdate under ZeRO 1 to 3 and expert parallelism: one process's numbers, and checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from strategy import sparse_update_runs as runs
from strategy.models import Case, build_net, reference

from lightning_fastmoe.checkpoint.whole import read_whole

CASE = Case(2, 2, num_experts=(4, 8), steps=2)
ALIGNMENT = 8  # elements that ZeRO may pad a group's partition with, of few groups
PARTS = {
    "last block": ({"last_layers": 1}, lambda n: n.startswith(("moes.1.", "head."))),
    "its experts": (
        {"last_layers": 1, "dense": False},
        lambda n: n.startswith("moes.1.experts."),
    ),
    "no experts": ({"experts": "none"}, lambda n: ".experts." not in n),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equals_one_process_and_leaves_the_rest(stage: int, part: str, rank_pool) -> None:
    options, is_trained = PARTS[part]
    case = replace(CASE, stage=stage)
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    initial = {n: p.detach().clone() for n, p in net.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(is_trained(name))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    expected = reference(case, net)
    results = rank_pool.run(runs.train, 2, case, options)
    for norms, weights, _ in results:
        assert norms == pytest.approx(expected.norms, rel=1e-5)
        for found, wanted in zip(weights[1:], expected.weights, strict=True):
            for name, value in found.items():
                if is_trained(name):
                    torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=2e-6)
                    assert not torch.equal(value, initial[name]), name
                else:
                    assert torch.equal(value, initial[name]), name
    states = sum(count for _, _, count in results)
    assert trained <= states <= trained + 2 * 2 * ALIGNMENT


def test_resumes_on_other_ranks_with_its_selection_alone(rank_pool, tmp_path) -> None:
    options, is_trained = PARTS["its experts"]
    path = str(tmp_path / "saved")
    case = replace(CASE, steps=4, batches_per_epoch=2)
    saved = rank_pool.run(runs.train, 2, case, options, None, path)[0][1]
    state = read_whole(tmp_path / "saved")["state_dict"]
    assert {f"net.{name}" for name in saved[-1]} <= set(state)
    for name, value in saved[-1].items():
        assert torch.equal(state[f"net.{name}"], value), name
    case = replace(case, epochs=2)
    whole = rank_pool.run(runs.train, 2, case, options)[0][1]
    resumed = rank_pool.run(runs.train, 2, case, options, path)[0][1]
    alone_case = replace(case, world=1, ep=1)
    ((_, alone, _),) = rank_pool.run(runs.train, 1, alone_case, options, path)
    for name, value in whole[-1].items():
        assert torch.equal(resumed[-1][name], value), name
        if is_trained(name):  # on one rank, with that rank's data alone
            assert 0 < float((alone[-1][name] - saved[-1][name]).abs().max()) < 0.1, name
        else:
            assert torch.equal(alone[-1][name], saved[0][name]), name
    for said in rank_pool.run(runs.error_of, 2, case, {"last_layers": 1}, path):
        assert said is not None
        assert "another selection" in said
