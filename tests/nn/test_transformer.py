"""Rotary positions."""

from __future__ import annotations

import math

import torch

from lightning_fastmoe.nn.transformer import rotary_table, rotate


def test_rotary_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator)
    table = rotary_table(40, 8, torch.device("cpu"))
    queries, keys = (rotate(x.expand(40, 8), table) for x in (query, key))
    scores = queries @ keys.T
    torch.testing.assert_close(scores[5, 2], scores[39, 36])
    assert not math.isclose(scores[5, 2], scores[5, 3], rel_tol=1e-3)
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(40))
