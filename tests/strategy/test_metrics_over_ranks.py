"""The metrics on two ranks with different numbers of tokens against one process."""

from __future__ import annotations

import pytest
import torch
from strategy import metric_runs as runs


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_two_ranks_equal_one_process(rank_pool, capacity_factor):
    ranks = rank_pool.run(runs.measure, 2, capacity_factor)
    alone = runs.values(capacity_factor, runs.passes([0, 1]))
    assert alone["DeadExperts"] > 0
    assert (alone["DropRate"] > 0) == (capacity_factor is not None)
    own = runs.values(capacity_factor, runs.passes([0]))
    for name, want in alone.items():
        for found in ranks:
            torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12, equal_nan=True)
        if name != "DropRate":
            assert not torch.equal(own[name].nan_to_num(9), want.nan_to_num(9)), name
