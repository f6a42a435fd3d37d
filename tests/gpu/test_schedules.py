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
    tolerance = TOLERANCES[dtype]
    results = run(rank_pool, runs.compared, world, schedule, placement, "cuda", dtype)
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
    for tensors in run(rank_pool, dedup_runs.on_device, world, name, "cuda"):
        for found, right in tensors:
            assert float((found.double() - right).norm()) <= 6e-3 * float(right.norm())
