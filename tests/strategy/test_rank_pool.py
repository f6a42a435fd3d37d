"""Worker processes serve many cases, so no case may leave anything behind for the next."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from strategy import nonfinite_runs as runs
from strategy.models import Case

from lightning_fastmoe.testing import RankError, RankPool


def test_zero_3_changes_no_bit_of_a_later_run(rank_pool):
    case = Case(world=4, ep=2, stage=2, steps=4, extra={"nonfinite": "skip"})
    before = rank_pool.run(runs.fit, 4, case)[0].at_the_end
    rank_pool.run(runs.fit, 4, replace(case, stage=3))
    after = rank_pool.run(runs.fit, 4, case)[0].at_the_end
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


def test_new_workers_have_the_environment_of_their_pool(monkeypatch):
    found = []
    for value in ("1", "2"):
        monkeypatch.setenv("OF_THIS_POOL", value)
        pool = RankPool()
        found += pool.run(os.getenv, 1, "OF_THIS_POOL")
        pool.close()
    assert found == ["1", "2"]


def test_a_worker_that_dies_is_reported_with_its_signal():
    pool = RankPool()
    with pytest.raises(RankError, match="ended by SIGKILL") as raised:
        pool.run(_die, 1)
    assert raised.value.errors[0][0] == "ProcessDied"
    assert pool.run(os.getpid, 1)  # a new worker takes its place
    pool.close()


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
