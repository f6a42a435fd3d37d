"""A plain loop over NCCL trains to the numbers of one process on the CPU, and resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import data_parallel_runs as runs
from distributed.data_parallel_runs import Case
from gpu.sharing import run

from lightning_fastmoe.testing import RankPool

WORLD = 4 if torch.cuda.device_count() >= 4 else 2


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("ep", [1, 2])
def test_equals_one_process(rank_pool: RankPool, ep: int) -> None:
    case = Case(world=WORLD, ep=ep, accumulate=2, device_type="cuda")
    runs.check(case, run(rank_pool, runs.train, WORLD, case))


def test_resumes_on_another_size(rank_pool: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "state.pt")
    run(rank_pool, runs.save, WORLD, Case(world=WORLD, ep=2, device_type="cuda"), path)
    traces = run(rank_pool, runs.resume, WORLD, Case(world=WORLD, device_type="cuda"), path)
    traces[0].losses = torch.tensor([t.losses for t in traces]).mean(0).tolist()
    runs.assert_same(traces[0], runs.twin(Case(world=WORLD), start=3, stop=6))
