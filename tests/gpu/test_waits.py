"""A training step waits for the device once, to read whether the step is taken.

The update of the weights is queued by then, so the device doesn't run dry. (In fp32 each layer
waits as well: its experts run one by one, and the host must know how many rows each has.)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpu.waits_of_steps import waits

from lightning_fastmoe.testing import RankPool


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_waits_once(stage: int, precision: str, rank_pool: RankPool) -> None:
    (steps,) = rank_pool.run(waits, 1, stage, precision)
    for step in steps[2:]:
        assert len(step) == 1, "\n".join(step)
        assert "read" in step[0]
