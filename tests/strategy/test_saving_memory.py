"""A save needs buffers, not a copy of the state, in any stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from strategy import saving_memory_runs as runs
from strategy.models import Case

STATE = 12 * 4 * runs.D_MODEL * runs.D_FFN * runs.EXPERTS
"""Bytes: weights and two states in fp32, of experts and as many others."""
LIMIT = 60_000_000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_hardly_rises(rank_pool, tmp_path, stage):
    case = Case(world=2, ep=2, stage=stage, steps=2)
    path = tmp_path / "a.ckpt"
    results = rank_pool.run(runs.rise_during_a_save, 2, case, str(path))
    saved = sum(file.stat().st_size for file in Path(path).rglob("*.safetensors"))
    assert saved == pytest.approx(STATE, rel=0.01)
    for rise, own in results:
        assert own == pytest.approx(STATE / 2, rel=0.01)
        assert own > 2 * LIMIT
        assert rise < LIMIT
