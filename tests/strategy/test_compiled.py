"""torch.compile in all the ways that people use: same numbers, same names, same checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy.compiled_runs import WAYS, all_ways
from strategy.models import Case

CASE = Case(world=2, ep=2, num_experts=(4, 6), steps=2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_compiled_equals_plain(stage: int, tmp_path: Path, rank_pool) -> None:
    """Bit by bit, as the back end "eager" computes what the plain model does."""
    for outcomes in rank_pool.run(
        all_ways, 2, replace(CASE, stage=stage), str(tmp_path), WAYS, timeout=300
    ):
        plain = outcomes["plain"]
        assert plain[0].layers == ["net.blocks.0.moe", "net.blocks.1.moe"]
        assert {f"from {way}" for way in WAYS} | {"plain", *WAYS} == outcomes.keys()
        for way, pair in outcomes.items():
            for expected, outcome in zip(plain, pair, strict=True):
                assert outcome.layers == expected.layers, way
                assert outcome.losses == expected.losses, way
                assert outcome.validated == expected.validated, way
                assert outcome.checkpoint.keys() == expected.checkpoint.keys(), way
                for name, value in expected.checkpoint.items():
                    assert torch.equal(outcome.checkpoint[name], value), (way, name)
