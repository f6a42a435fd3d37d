"""A save in the middle of an epoch, and of a step whose gradients are half accumulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategy import midway_runs as runs
from strategy.models import Case

from lightning_fastmoe.checkpoint import CheckpointReader

MIDDLES = {2: "two of three batches of the first step", 11: "and in the second epoch"}
"""After so many batches."""


def case_of(world=2, ep=2, stage=2, kind=Case, **kwargs) -> Case:
    return kind(world, ep, stage, runs.ACCUMULATE, epochs=runs.EPOCHS, **kwargs)


CASES = [
    case_of(stage=1),
    case_of(stage=2),
    case_of(stage=3),
    case_of(stage=1, precision="bf16-mixed"),
    case_of(stage=2, precision="bf16-mixed"),
    case_of(stage=2, extra={"offload_optimizer": True}),
    case_of(stage=3, extra={"offload_optimizer": True}),
]


def ident(case: Case) -> str:
    offload = "-offload" if case.extra else ""
    modules = "modules-" if isinstance(case, runs.ModuleCase) else ""
    return f"{modules}world{case.world}-zero{case.stage}-{case.precision}{offload}"


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_resuming_midway_changes_no_bit(rank_pool, tmp_path, case):
    saves = {n: str(tmp_path / f"{n}.ckpt") for n in MIDDLES}
    results = rank_pool.run(runs.straight_and_resumed, case.world, case, saves)
    for straight, resumed in results:
        assert len(straight.losses) == runs.BATCHES * runs.EPOCHS
        assert len(set(straight.losses)) > runs.BATCHES
        for batches, rest in resumed.items():
            steps = len(straight.norms) - len(rest.norms)
            assert rest.losses == straight.losses[batches:], batches
            assert rest.norms == straight.norms[steps:], batches
            for name, weight in straight.weights.items():
                assert torch.equal(rest.weights[name], weight), (batches, name)


def gradients_in(path) -> set[str]:
    with CheckpointReader(path) as reader:
        return {n.split("/net")[0] for n in reader.manifest.tensors if n.startswith("gradients/")}


PAIRS = [
    (case_of(4, 2, 1), case_of(2, 2, 1)),
    (case_of(2, 1, 1), case_of(4, 4, 2)),
    (case_of(2, 2, 2), case_of(4, 2, 1)),
    (case_of(4, 4, 3), case_of(2, 1, 2)),
    (case_of(4, 2, 1, runs.ModuleCase), case_of(2, 2, 2, runs.ModuleCase)),
    (case_of(2, 2, 3, runs.ModuleCase), case_of(4, 4, 1, runs.ModuleCase)),
]


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=ident)
def test_half_a_step_is_finished_on_other_ranks(rank_pool, tmp_path, before, after):
    """Without load-balancing loss and dropout, which other ranks compute otherwise."""
    path = str(tmp_path / "a.ckpt")
    before, after = (replace(c, coefficients=(0, 1e-3)) for c in (before, after))
    straight = rank_pool.run(runs.fit, before.world, before, 0.0, 7, {5: path})
    kinds = {1: {"gradients/local"}, 2: {"gradients/mean"}, 3: {"gradients/mean"}}
    assert gradients_in(path) == kinds[before.stage]
    resumed = rank_pool.run(runs.fit, after.world, after, 0.0, 8, {}, path)
    norms = straight[0].norms
    for rest in resumed:
        assert rest.norms == pytest.approx(norms[1:], rel=1e-6)
    losses = [sum(step) / len(step) for step in zip(*(r.losses for r in straight), strict=True)]
    after_losses = [sum(s) / len(s) for s in zip(*(r.losses for r in resumed), strict=True)]
    assert after_losses == pytest.approx(losses[5:], rel=1e-6)


def test_other_ranks_count_batches_otherwise(rank_pool, tmp_path):
    paths = {n: str(tmp_path / f"{n}.ckpt") for n in (5, 7)}
    rank_pool.run(runs.fit, 2, case_of(), 0.0, 7, paths)
    said = {n: rank_pool.run(runs.warnings_of, 1, case_of(1, 1), path) for n, path in paths.items()}
    (midway,) = [w for w in said[5][0] if "in the middle of an epoch" in w]
    assert "after 5 batches on each of 2 ranks" in midway
    assert "skips as many on each of 1," in midway
    assert not any("in the middle of an epoch" in w for w in said[7][0])
    same = rank_pool.run(runs.warnings_of, 2, case_of(), paths[5])
    assert not any("in the middle of an epoch" in w for w in same[0])
    validating = rank_pool.run(runs.warnings_of_validating, 1, case_of(1, 1), paths[5])[0]
    assert not any("in the middle of an epoch" in w for w in validating)
