"""The contract of schedules on GPUs: NCCL between all of one host, and with itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from distributed import dedup_runs
from distributed import schedule_runs as runs
from gpu.sharing import run

from lightning_fastmoe.distributed.schedule import ACROSS_RANKS
from lightning_fastmoe.testing import RankPool

WORLDS = [1, 2, 4] if torch.cuda.device_count() >= 4 else [1, 2]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("placement", runs.PLACEMENTS)
@pytest.mark.parametrize("schedule", ACROSS_RANKS)
def test_equals_all_experts_on_one_rank(
    schedule: str, placement: str, world: int, dtype: torch.dtype, rank_pool: RankPool
) -> None:
    results = run(rank_pool, runs.compared, world, schedule, placement, "cuda", dtype)
    check(results, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("placement", runs.PLACEMENTS)
def test_two_levels_equal_all_experts_on_one_rank(
    placement: str, dtype: torch.dtype, rank_pool: RankPool
) -> None:
    """Two nodes, as far as NCCL knows, with the same GPUs."""
    given = (runs.compared, 4, "dedup", placement, "cuda", dtype)
    check(rank_pool.run(*given, ranks_per_node=2), TOLERANCES[dtype])


def check(results: list[runs.Results], tolerance: float) -> None:
    for rank, cases in enumerate(results):
        for case, tensors in cases.items():
            for name, (found, right) in tensors.items():
                error = float((found.double() - right.double()).abs().max()) if len(right) else 0
                scale = float(right.double().abs().max()) if len(right) else 1
                assert error <= tolerance * max(scale, 1), (rank, case, name, error, scale)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [name for name in ACROSS_RANKS if name.startswith("dedup")])
def test_fused_layers_of_several_ranks_wait_for_counts_alone(
    name: str, world: int, rank_pool: RankPool
) -> None:
    """In bf16, against fp64; the same bits twice, without a synchronisation of the device."""
    check_bf16(run(rank_pool, dedup_runs.on_device, world, name, "cuda"))


def test_two_levels_wait_for_counts_alone(rank_pool: RankPool) -> None:
    check_bf16(rank_pool.run(dedup_runs.on_device, 4, "dedup", "cuda", ranks_per_node=2))


def check_bf16(results: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    for tensors in results:
        for found, right in tensors:
            assert float((found.double() - right).norm()) <= 6e-3 * float(right.norm())
