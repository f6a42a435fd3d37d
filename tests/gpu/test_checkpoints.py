"""Saving and resuming on GPUs: bit by bit on the same ranks, to rounding on others.

Two ranks need two GPUs for NCCL. With one GPU they share it through gloo.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strategy import background_runs, midway_runs, reshard_runs, signal_runs
from strategy.contents import (
    assert_goes_on,
    assert_same_content,
    assert_same_files,
    mean_losses,
)
from strategy.models import Case
from strategy.reshard_runs import Layout

from lightning_fastmoe.testing import RankPool

ACCELERATOR = "cuda"
SHARED = torch.cuda.device_count() < 2
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def run(pool: RankPool, function: Any, world: int, *args: Any) -> list[Any]:
    """On one node, or where ranks share a GPU, on as many nodes of one GPU as they believe."""
    return pool.run(function, world, *args, ranks_per_node=1 if SHARED else None, timeout=200.0)


def case_of(world: int, stage: int, precision: str = "32-true", ep: int = 0, **kwargs: Any) -> Case:
    """Seven batches in an epoch, three of which make a step."""
    shared = SHARED and world > 1
    return Case(
        world,
        ep or world,
        stage,
        midway_runs.ACCUMULATE,
        precision=precision,
        accelerator=ACCELERATOR,
        nodes=world if shared else 1,
        shared_gpu=shared,
        epochs=midway_runs.EPOCHS,
        **kwargs,
    )


# ---------------------------------------------------------------- the same ranks: the same numbers

# Half precision overflows from 2^16 on, as the gradient of a loss in fp16 is the scale itself: the
# first two steps are dropped. Later ones are taken, and every two of them double the scale.
SCALED = {"initial_scale_power": 17, "loss_scale_window": 2, "hysteresis": 1}
OFFLOADED = {"offload_optimizer": True}

RESUMED = {
    "zero1-bf16": case_of(1, 1, "bf16-mixed"),
    "zero2-fp32": case_of(1, 2),
    "zero3-bf16": case_of(1, 3, "bf16-mixed"),
    "zero2-fp16": case_of(1, 2, "16-mixed", extra=SCALED),
    "zero3-fp16": case_of(1, 3, "16-mixed", extra=SCALED),
    "zero2-fp32-offload": case_of(1, 2, extra=OFFLOADED, fused=False),
    "zero3-bf16-offload": case_of(1, 3, "bf16-mixed", extra=OFFLOADED, fused=False),
    "zero2-fp32-foreach": case_of(1, 2, fused=False),
    "two-zero1-fp32": case_of(2, 1),
    "two-zero2-bf16": case_of(2, 2, "bf16-mixed"),
    "two-zero3-fp32": case_of(2, 3),
    "two-zero1-fp16": case_of(2, 1, "16-mixed", extra=SCALED),
    "two-zero2-bf16-fused": case_of(2, 2, "bf16-mixed", ep=1, fused=True),
}
MIDDLES = (2, 11)
"""Saves after so many batches: in the first step, and in a step of the second epoch."""


@pytest.mark.parametrize("name", list(RESUMED))
def test_resuming_midway_changes_no_bit(rank_pool: RankPool, tmp_path: Path, name: str) -> None:
    """With dropout on the device, whose generator must go on where it was."""
    case = RESUMED[name]
    saves = {n: str(tmp_path / f"{n}.ckpt") for n in MIDDLES}
    results = run(rank_pool, midway_runs.straight_and_resumed, case.world, case, saves)
    for straight, resumed in results:
        assert len(straight.losses) == midway_runs.BATCHES * midway_runs.EPOCHS
        assert len(set(straight.losses)) > midway_runs.BATCHES
        dropped = [norm is None for norm in straight.norms]
        if case.precision == "16-mixed":
            assert dropped[0], straight.scales
            assert not all(dropped), straight.scales
            assert len(set(straight.scales)) > 1
        else:
            assert not any(dropped)
        for batches, rest in resumed.items():
            steps = len(straight.norms) - len(rest.norms)
            assert len(rest.losses) == len(straight.losses) - batches
            assert rest.losses == straight.losses[batches:], batches
            assert rest.norms == straight.norms[steps:], batches
            assert rest.scales == straight.scales[steps:], batches
            assert rest.weights.keys() == straight.weights.keys()
            for key, weight in straight.weights.items():
                assert torch.equal(rest.weights[key], weight), (batches, key)


# ------------------------------------------------------------------------------ in the background

BACKGROUND = {
    "zero2-bf16": case_of(1, 2, "bf16-mixed"),
    "zero3-fp32": case_of(1, 3),
    "zero2-fp32-offload": case_of(1, 2, extra=OFFLOADED, fused=False),
    "two-zero1-fp32": case_of(2, 1),
    "two-zero3-bf16": case_of(2, 3, "bf16-mixed"),
}
SAVES = (2, 8)
"""Both in the middle of a step; the second is copied into memory that the first has left."""


@pytest.mark.parametrize("name", list(BACKGROUND))
def test_saving_in_the_background_writes_the_moment(
    rank_pool: RankPool, tmp_path: Path, name: str
) -> None:
    """The thread reads its copies only after two more steps have changed the live state."""
    case = BACKGROUND[name]
    waited, went_on = (
        {n: str(tmp_path / f"{kind}-{n}.ckpt") for n in SAVES} for kind in ("waited", "went-on")
    )
    results = run(rank_pool, background_runs.both_kinds, case.world, case, waited, went_on)
    for pair in results:
        assert len(pair.ahead) == len(SAVES), "training did not go on beside the thread"
        assert pair.went_on.losses == pair.waited.losses
        assert pair.went_on.norms == pair.waited.norms
        for key, weight in pair.waited.weights.items():
            assert torch.equal(pair.went_on.weights[key], weight), key
        if ACCELERATOR == "cuda" and not case.extra:
            assert pair.pinned == {True}
    for n in SAVES:
        assert_same_files(waited[n], went_on[n])


# ------------------------------------------------------------------------------------- on a signal

BATCH = 5
"""In the middle of a step."""


@pytest.mark.parametrize("case", [case_of(1, 2), case_of(2, 3), case_of(2, 1, "bf16-mixed")])
def test_sigterm_saves_between_two_batches(rank_pool: RankPool, tmp_path: Path, case: Case) -> None:
    """Ranks tell each other of it through a group of their own, beside that of the tokens."""
    results = run(rank_pool, signal_runs.terminated, case.world, case, BATCH, str(tmp_path))
    for ended, done, straight, rest in results:
        assert ended == "SIGTERMException"
        assert done == BATCH + (case.world > 1)
        assert_goes_on(straight, rest, done)


# -------------------------------------------------------------------------------- on other ranks


def layout(world: int, ep: int, stage: int) -> Layout:
    return Layout(world, ep, stage, accelerator=ACCELERATOR, shared_gpu=SHARED and world > 1)


LAYOUTS = [
    layout(world, ep, stage) for world, ep in ((1, 1), (2, 1), (2, 2)) for stage in (1, 2, 3)
]
# Each layout once on each side: every change of ranks and experts, and every change of stage.
PAIRS = list(zip(LAYOUTS, (LAYOUTS[i] for i in (1, 3, 6, 0, 5, 7, 8, 4, 2)), strict=True))
# Experts that are modules, of which ranks have different ones.
MODULE_PAIRS = [
    (replace(LAYOUTS[a], experts=kind), replace(LAYOUTS[b], experts=kind))
    for a, b, kind in ((0, 8, "list"), (8, 1, "list"), (4, 6, "class"), (7, 2, "class"))
]
ALL_PAIRS = PAIRS + MODULE_PAIRS


@pytest.fixture(scope="module")
def saved(
    rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, tuple[Path, list[float], list[float]]]:
    """layout -> (checkpoint, losses and norms of the run that went on)."""
    directory = tmp_path_factory.mktemp("saved")
    made = {}
    for world in (1, 2):
        own = [one for one, _ in ALL_PAIRS if one.world == world]
        paths = [str(directory / f"{one}.ckpt") for one in own]
        by_rank = run(rank_pool, reshard_runs.straight_all, world, own, paths)
        for one, path, ranks in zip(own, paths, zip(*by_rank, strict=True), strict=True):
            made[one] = (Path(path), mean_losses(ranks), ranks[0].norms)
    return made


def test_the_pairs_cover_every_change() -> None:
    assert {b for _, b in PAIRS} == set(LAYOUTS)
    assert all(a != b for a, b in PAIRS)
    ranks = {((a.world, a.ep), (b.world, b.ep)) for a, b in PAIRS}
    assert len(ranks) == len({(a.stage, b.stage) for a, b in PAIRS}) == 9


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")
def test_resumes_on_another_topology(
    rank_pool: RankPool, tmp_path: Path, saved: Any, pair: tuple[Layout, Layout]
) -> None:
    before, after = pair
    path, losses, norms = saved[before]
    again = tmp_path / "again.ckpt"
    results = run(rank_pool, reshard_runs.resumed, after.world, after, str(path), str(again))
    assert_same_content(path, again, reshard_runs.SOME_EXPERT[before.experts])
    shutil.rmtree(again)
    left = reshard_runs.STEPS - reshard_runs.SAVED
    assert len(set(losses)) == len(set(norms)) == reshard_runs.STEPS
    assert mean_losses(results) == pytest.approx(losses[-left:], rel=RELATIVE)
    for rank in results:
        assert rank.norms == pytest.approx(norms[-left:], rel=RELATIVE)
