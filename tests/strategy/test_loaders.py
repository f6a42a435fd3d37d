"""Resuming reads the batches that the uninterrupted run would have read, from ordinary loaders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from strategy import loader_runs as runs

from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.strategy.loaders.resumable import ResumableLoader

TESTS = Path(__file__).parents[1]
SAVES = (4, 5, 7)
"""At the end of the first epoch; after one batch of the second, and after all but one."""


@pytest.mark.parametrize("kind", ["sampled", "random", "stream", "own"])
def test_the_order_is_that_of_the_uninterrupted_run(rank_pool, tmp_path, kind):
    paths = {n: str(tmp_path / f"{n}.ckpt") for n in SAVES}
    for straight, resumed in rank_pool.run(runs.straight_and_resumed, 2, kind, 0, paths):
        assert_same_order(straight, resumed)


def test_workers_read_in_the_order_of_the_uninterrupted_run(tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "strategy.loader_runs", str(tmp_path)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == {"sampled", "persistent", "random"}
        for straight, resumed in found.values():
            assert_same_order(straight, {int(n): rest for n, rest in resumed.items()})


def assert_same_order(straight, resumed) -> None:
    order, weights = straight
    assert len(order) == runs.BATCHES * runs.EPOCHS
    assert order[:4] != order[4:8], "the test would see an epoch that is repeated"
    for batches, (rest, last) in resumed.items():
        assert rest == order[batches:], batches
        assert last == weights, batches


@pytest.mark.parametrize("kind", runs.COMBINED)
def test_other_ways_to_give_data_go_on_too(rank_pool, tmp_path, kind):
    path = str(tmp_path / "5.ckpt")
    ((order, weights),) = rank_pool.run(runs.combined, 1, kind, path, False)
    ((rest, last),) = rank_pool.run(runs.combined, 1, kind, path, True)
    assert len(order) > 5
    assert (rest, last) == (order[5:], weights)


def test_a_resumed_run_is_resumed(rank_pool, tmp_path):
    paths = [str(tmp_path / name) for name in ("a.ckpt", "b.ckpt")]
    for straight, resumed in rank_pool.run(runs.resumed_twice, 2, 0, *paths):
        assert resumed == (straight[0][7:], straight[1])


def test_saved_after_a_fit_that_ended_midway(rank_pool, tmp_path):
    """As in Lightning, a resumed run begins that epoch anew."""
    for straight, resumed in rank_pool.run(runs.ended_midway, 2, str(tmp_path / "a.ckpt")):
        assert resumed == straight[runs.BATCHES :]


def test_other_ranks_go_on_at_the_same_place_of_the_global_batch(rank_pool, tmp_path):
    path = str(tmp_path / "5.ckpt")
    two = [order for order, _ in rank_pool.run(runs.seen, 2, "sampled", 0, 2, {5: path})]
    ((one, _),) = rank_pool.run(runs.seen, 1, "sampled", 0, 1, {}, path)
    together = [sorted(a + b) for a, b in zip(*two, strict=True)]
    assert [sorted(batch) for batch in one] == together[5:]


def test_the_state_of_another_kind_of_loader_is_refused():
    with pytest.raises(CheckpointError, match=r"run's list has no load_state_dict"):
        ResumableLoader([1, 2], None).load_state_dict({"position": 3})
