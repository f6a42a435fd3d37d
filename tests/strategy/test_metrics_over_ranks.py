"""The metrics on two ranks with different numbers of tokens against one process."""

from __future__ import annotations

import pytest
import torch
from strategy import metric_runs as runs
from strategy.models import Case

from lightning_fastmoe.monitoring.logs import co_activation as co_activation_log


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


def test_co_activation_of_all_ranks_and_micro_batches(rank_pool, tmp_path):
    case = Case(world=2, ep=2, accumulate=2)
    ranks = rank_pool.run(runs.monitor, 2, case, str(tmp_path))
    log = co_activation_log.read(tmp_path / co_activation_log.FILE_NAME)
    assert (log.first_step, log.last_step) == (2, 2)
    assert [x.name for x in log.layers] == ["net.moes.0", "net.moes.1"]
    for layer, *own in zip(log.layers, *ranks, strict=True):
        assert layer.together == sum(own).tolist()
        assert layer.together != (2 * own[0]).tolist()
