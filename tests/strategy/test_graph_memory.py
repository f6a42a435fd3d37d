"""Gradients that CUDA graphs would overwrite before ZeRO has added the next micro-batch's."""

from __future__ import annotations

import pytest
from strategy.graph_memory_runs import train

from lightning_fastmoe.testing import RankPool

CASES = [
    (1, 1, 1, "32-true"),
    (1, 2, 1, "32-true"),
    (1, 2, 1, "bf16-true"),
    (1, 2, 1, "bf16-mixed"),
    (1, 3, 1, "32-true"),
    (2, 1, 1, "32-true"),
    (2, 1, 2, "bf16-mixed"),
    (2, 2, 1, "bf16-mixed"),
    (2, 2, 2, "32-true"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_accumulated_gradients_are_kept(
    case: tuple[int, int, int, str], rank_pool: RankPool
) -> None:
    world = case[0]
    plain = rank_pool.run(train, world, *case, False)
    overwritten = rank_pool.run(train, world, *case, True)
    for (weights, _), (same, times) in zip(plain, overwritten, strict=True):
        assert same == weights  # NaN, if a gradient was lost
        assert times >= 6 + 2  # micro-batches, and batches of validation
