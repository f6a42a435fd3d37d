"""SIGTERM, and SLURM's signal to requeue, in the middle of a batch on one rank."""

from __future__ import annotations

import pytest
import torch
from strategy import midway_runs
from strategy import signal_runs as runs
from strategy.models import Case

BATCH = 5
"""The second of a step's three: its gradients are half accumulated."""


def case_of(world: int, stage: int) -> Case:
    return Case(world, world, stage, midway_runs.ACCUMULATE, epochs=midway_runs.EPOCHS)


def assert_goes_on(straight, rest, done: int) -> None:
    assert rest.losses == straight.losses[done:]
    assert rest.norms == straight.norms[-len(rest.norms) :]
    assert all(torch.equal(rest.weights[name], w) for name, w in straight.weights.items())


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_all_ranks_stop_after_the_batch_and_save(rank_pool, tmp_path, world, stage):
    results = rank_pool.run(runs.terminated, world, case_of(world, stage), BATCH, str(tmp_path))
    for ended, done, straight, rest in results:
        assert ended == "SIGTERMException"
        assert done == BATCH
        assert_goes_on(straight, rest, done)


def test_slurm_saves_between_batches_on_all_ranks(rank_pool, tmp_path):
    results = rank_pool.run(runs.requeued, 2, case_of(2, 2), BATCH, str(tmp_path))
    for done, straight, rest in results:
        assert done == len(straight.losses), "requeueing does not end the run by itself"
        assert_goes_on(straight, rest, BATCH)
