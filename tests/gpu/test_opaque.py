"""Sharded experts as an operator in compiled graphs on GPUs: the numbers of a graph with breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from distributed import opaque_runs as runs
from gpu.sharing import run

from lightning_fastmoe.distributed.schedule import ACROSS_RANKS
from lightning_fastmoe.testing import RankPool


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def tolerance_of(name: str, dtype: torch.dtype) -> float:
    """The error, relative to the norm, of a value of :class:`opaque_runs.Pair`.

    On a GPU inductor gives kernels numbers that depend on a dynamic number of tokens in fp32, which
    is where fp64 differs: a balancing loss by 1.5e-8, and by so much its share of gradients. In
    bf16 roundings of losses in fp32 may turn a bit of a gradient.
    """
    is_loss = name.endswith(("_loss", "_balancing"))
    if dtype == torch.float64:
        return 1e-7 if is_loss else 1e-9
    if is_loss:
        return 1e-6
    is_gradient = name == "input's" or name.startswith(("0.", "1."))
    return 2e-4 if is_gradient else 0.0


@pytest.mark.parametrize("dispatcher", ACROSS_RANKS)
@pytest.mark.parametrize(
    ("backend", "dtype", "width"),
    [
        pytest.param("eager", torch.bfloat16, 64, id="bf16"),  # the operators in C++
        pytest.param("inductor", torch.float64, 8, id="fp64"),
    ],
)
def test_every_dispatcher_is_an_operator_with_the_same_numbers(
    dispatcher: str, backend: str, dtype: torch.dtype, width: int, rank_pool: RankPool
) -> None:
    settings = {"dispatcher": dispatcher, "width": width}
    arguments = (settings, "cuda", backend, dtype, None, (40, 600, 300))
    for rank, (passes, _, kept) in enumerate(
        run(rank_pool, runs.compared, 2, *arguments, timeout=200)
    ):
        assert kept == 0
        for i, values in enumerate(passes):
            for name, (found, right) in values.items():
                assert (found is None) == (right is None), (rank, i, name)
                if right is not None:
                    scale = max(float(right.double().norm()), 1e-30)
                    error = float((found.double() - right.double()).norm()) / scale
                    assert error <= tolerance_of(name, dtype), (rank, i, name, error)
