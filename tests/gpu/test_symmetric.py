"""Rows pushed into other processes' GPU memory: on several GPUs, or on one that ranks share.

Ranks on one GPU take turns of milliseconds, so waits are slow there, and times say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import dedup_runs, schedule_runs
from distributed import symmetric_runs as runs

from lightning_fastmoe.testing import RankError, RankPool

WORLDS = sorted({1, 2, max(2, min(4, torch.cuda.device_count()))})
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
LIMIT = 240.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("placement", schedule_runs.PLACEMENTS)
def test_equals_all_experts_on_one_rank(
    placement: str, world: int, dtype: torch.dtype, rank_pool: RankPool
) -> None:
    arguments = ("symmetric", placement, "cuda", dtype)
    results = rank_pool.run(schedule_runs.compared, world, *arguments, timeout=LIMIT)
    for rank, cases in enumerate(results):
        for case, tensors in cases.items():
            for name, (found, right) in tensors.items():
                error = float((found.double() - right.double()).abs().max()) if len(right) else 0
                scale = float(right.double().abs().max()) if len(right) else 1
                assert error <= TOLERANCES[dtype] * max(scale, 1), (rank, case, name, error, scale)


@pytest.mark.parametrize("world", WORLDS)
def test_a_layer_in_bf16_against_fp64_waits_for_counts_alone(
    world: int, rank_pool: RankPool
) -> None:
    """And gives the bits of dedup."""
    by_symmetric, by_dedup = (
        rank_pool.run(dedup_runs.on_device, world, name, "cuda", timeout=LIMIT)
        for name in ("symmetric", "dedup")
    )
    for tensors, same in zip(by_symmetric, by_dedup, strict=True):
        for (found, right), (bits, _) in zip(tensors, same, strict=True):
            assert float((found.double() - right).norm()) <= 6e-3 * float(right.norm())
            assert torch.equal(found, bits)


def test_memory_grows_with_the_tokens_of_any_rank_and_nothing_unwritten_is_read(
    rank_pool: RankPool,
) -> None:
    calls = [(5, 9), (40, 1), (0, 0), (300, 2000), (2000, 300), (2050, 1)]
    for found in rank_pool.run(runs.numbers_of_tokens, 2, "cuda", calls, timeout=LIMIT):
        assert max(found["errors"]) < 1e-10
        first, *rest = found["capacities"]
        assert rest == [first, first, rest[2], rest[2], rest[2]]
        assert first < rest[2]


def test_experts_launched_before_the_host_knows_the_counts(
    rank_pool: RankPool,
) -> None:
    """The bits of a pass that waits, step by step; also where more tokens came than expected."""
    calls = [(300, 300), (300, 300), (280, 290), (5, 0), (0, 0), (350, 350), (2000, 3), (1900, 3)]
    results = rank_pool.run(runs.reading_ahead, 2, "cuda", calls, timeout=LIMIT)
    for rank, found in enumerate(results):
        assert found["wrong"] == []
        # Nothing was expected at first. The seventh call had no room on rank 0, which knew that.
        ahead = "by operators" if torch.cuda.get_device_capability() == (9, 0) else "ahead"
        short = "exactly" if rank == 0 else f"{ahead} then exactly"
        too_many = f"{ahead} then exactly"
        assert found["how"] == ["exactly", *[ahead] * 4, too_many, short, ahead]


def test_operators_with_frozen_parts(rank_pool: RankPool) -> None:
    """Which gradients are wanted decides how the backward pass is made."""
    for wrong in rank_pool.run(runs.frozen_parts, 2, "cuda", 3, timeout=LIMIT):
        assert wrong == []


def test_with_one_slot_the_weights_are_multiplied_before_rounding_in_either_way(
    rank_pool: RankPool,
) -> None:
    calls = [(300, 300), (200, 210), (5, 0), (250, 240)]
    for found in rank_pool.run(runs.reading_ahead, 2, "cuda", calls, 1, timeout=LIMIT):
        ahead = "by operators" if torch.cuda.get_device_capability() == (9, 0) else "ahead"
        assert found == {"wrong": [], "how": ["exactly", *[ahead] * 3]}


def test_ranks_far_apart_get_the_same_bits(rank_pool: RankPool) -> None:
    arguments = ("cuda", 200, 4e-3)
    assert rank_pool.run(runs.at_random_times, 2, *arguments, timeout=LIMIT) == [[], []]


def test_a_rank_that_never_comes_is_named_at_the_deadline(rank_pool: RankPool) -> None:
    (error, took), _ = rank_pool.run(runs.faults, 2, "cuda", "never comes", timeout=LIMIT)
    assert 2.5 < took < 20
    assert "phase counts: rank 0 has waited 3 s for the other ranks" in error
    assert "Missing: rank 1 of the expert parallel group" in error
    assert "then: a layer" in error


def test_nobody_waits_for_a_rank_that_has_given_up(rank_pool: RankPool) -> None:
    (error, took), _ = rank_pool.run(runs.faults, 2, "cuda", "given up", timeout=LIMIT)
    assert "Given up: rank 1 of the expert parallel group" in error
    assert took < 20


@pytest.mark.parametrize("where", ["other layers", "the end"])
def test_ranks_in_other_layers_are_an_error_on_all(where: str, rank_pool: RankPool) -> None:
    for error, _ in rank_pool.run(runs.faults, 2, "cuda", where, timeout=LIMIT):
        assert "Every rank must run the same MoE layers" in error


def test_what_never_came_is_never_used(tmp_path: Path) -> None:
    """A backward pass that one rank doesn't make: the other's device traps at the deadline."""
    pool = RankPool()  # its processes can't use the GPU afterwards
    try:
        with pytest.raises(RankError):
            pool.run(runs.without_backward_on_device, 2, str(tmp_path), timeout=LIMIT)
    finally:
        pool.close()
    said = json.loads((tmp_path / "rank0.json").read_text())
    assert said["device"], said
    assert 2.0 < said["seconds"] < 30
    assert "rank 1 of the expert parallel group was not there" in said["report"]
    assert "phase combine (backward): rank 0 has waited 3 s" in said["next"]
    assert "Missing: rank 1" in said["next"]
