"""Deduplication in two levels: the numbers of one rank, and one row per (token, node)."""

from __future__ import annotations

import pytest
from distributed import two_level_runs as runs

PLACEMENTS = {
    "blocks": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "scattered": [[1, 6], [0, 2, 7], [5], [3, 4]],
}


@pytest.mark.parametrize("local", [2, 1, 4], ids=["2 x 2", "4 x 1", "1 x 4"])
@pytest.mark.parametrize("name", list(PLACEMENTS))
def test_equals_one_rank_and_sends_each_token_once_to_each_node(rank_pool, local, name):
    total = 0
    for found, rows in rank_pool.run(runs.compared, 4, local, PLACEMENTS[name]):
        for key, (value, right) in found.items():
            bound = 1e-12 * max(1.0, float(right.norm()))
            assert float((value - right).norm()) <= bound, key
        for case, sent, pairs in rows:
            assert sent == pairs, case
            total += sent
    assert (total > 0) == (local < 4)
