"""Bits of one process on GPUs, over NCCL and through symmetric memory; ranks may share a GPU.

In bf16 on GPUs of compute capability 9.0 the products are this package's kernels, in which a row's
bits depend neither on its place nor on the others: there one process may have any tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed import exact_runs as runs
from gpu.sharing import run

from lightning_fastmoe.nn.dispatch import EXACT, ONE_RANK
from lightning_fastmoe.testing import RankPool

LIMIT = 240.0
NAMES = [name for name in EXACT if name not in ONE_RANK]
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 1e-2}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def go(name: str, pool: RankPool, world: int, function: Any, *args: Any) -> list[Any]:
    """On ranks of one host; for NCCL on hosts of their own, if they share a GPU."""
    if name == "symmetric":
        return pool.run(function, world, *args, timeout=LIMIT)
    return run(pool, function, world, *args, timeout=LIMIT)


def check(results: list[runs.Results], dtype: torch.dtype) -> None:
    for rank, cases in enumerate(results):
        for case, found in cases.items():
            assert not runs.EXACT & {*found["unequal"]}, (rank, case, found)
            if runs.CASES[case[1]].kind != "biased":
                assert "weights" not in found["unequal"], (rank, case)
            assert max(found["errors"].values()) <= TOLERANCES[dtype], (rank, case, found)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_of_tokens_have_the_bits_of_one_process(
    name: str, dtype: torch.dtype, rank_pool: RankPool
) -> None:
    check(go(name, rank_pool, 2, runs.compared, [name], "cuda", dtype), dtype)


@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("name", NAMES)
def test_one_process_may_have_other_tokens(name: str, rank_pool: RankPool) -> None:
    kinds = ("plain", "biased")
    cases = tuple(what for what, case in runs.CASES.items() if case.kind in kinds)
    arguments = ([name], "cuda", torch.bfloat16, "equal blocks", True, cases, True)
    check(go(name, rank_pool, 2, runs.compared, *arguments), torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_option_half_precision_is_rounded_once_more(
    name: str, rank_pool: RankPool
) -> None:
    arguments = ([name], "cuda", torch.bfloat16, "equal blocks", False, ("plain",))
    for results in go(name, rank_pool, 2, runs.compared, *arguments):
        assert {"output", "x"} <= {*results[name, "plain"]["unequal"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_waits_for_counts_alone(name: str, rank_pool: RankPool) -> None:
    for same in go(name, rank_pool, 2, runs.waits, name, "cuda"):
        assert all(same)
