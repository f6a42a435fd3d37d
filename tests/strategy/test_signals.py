"""What ends a run in the middle of a batch: SIGTERM, Ctrl-C, SLURM's signal, an error."""

from __future__ import annotations

import signal

import pytest
from strategy import midway_runs
from strategy import signal_runs as runs
from strategy.contents import assert_goes_on
from strategy.models import Case

BATCH = 5
"""The second of a step's three: its gradients are half accumulated."""


def case_of(world: int, stage: int) -> Case:
    return Case(world, world, stage, midway_runs.ACCUMULATE, epochs=midway_runs.EPOCHS)


@pytest.mark.parametrize(
    ("number", "exception"),
    [(signal.SIGTERM, "SIGTERMException"), (signal.SIGINT, "SystemExit")],
    ids=["SIGTERM", "SIGINT"],
)
@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_all_ranks_stop_after_the_batch_and_save(
    rank_pool, tmp_path, world, stage, number, exception
):
    """Although it comes to one of them alone."""
    arguments = case_of(world, stage), BATCH, str(tmp_path), number
    results = rank_pool.run(runs.terminated, world, *arguments)
    for ended, done, straight, rest in results:
        assert ended == exception
        assert done == BATCH + (world > 1)  # ranks know of each other a batch later
        assert_goes_on(straight, rest, done)


ALL = midway_runs.BATCHES * midway_runs.EPOCHS


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("when", "batches"),
    [
        ("before the first batch", lambda world: world),
        ("in the last batch", lambda world: ALL),
        ("after the last batch", lambda world: ALL),
    ],
)
def test_a_signal_that_no_batch_follows_ends_all_ranks(rank_pool, world, when, batches):
    """It must not be lost: a script would go on to its next call of the Trainer."""
    results = rank_pool.run(runs.ended_by_sigterm, world, case_of(world, 2), when)
    assert results == [("SIGTERMException", batches(world))] * world


def test_no_rank_begins_a_validation_that_others_would_leave(rank_pool):
    """Lightning leaves one after its first batch, but not on a rank on which that is the last."""
    results = rank_pool.run(runs.ended_before_validation, 2, case_of(2, 2), timeout=60)
    assert results == [("SIGTERMException", midway_runs.BATCHES)] * 2


INTERVAL, VALIDATE = 3, ["validate"] * runs.VALIDATION[0]
PART = ["train"] * INTERVAL + VALIDATE
WHOLE = (PART * 2 + ["train"]) * midway_runs.EPOCHS


@pytest.mark.parametrize(
    ("world", "step", "saves"), [(1, 1, True), (2, 1, False), (2, 2, True), (2, 6, False)]
)
def test_a_validation_is_left_and_the_resumed_run_repeats_it(
    rank_pool, tmp_path, world, step, saves
):
    """Not its rest alone, whose mean would be another; and no other random numbers are drawn."""
    arguments = case_of(world, 2), step, INTERVAL, saves, str(tmp_path)
    results = rank_pool.run(runs.terminated_in_validation, world, *arguments)
    for straight, ended, rest, is_same in results:
        assert straight.steps == WHOLE
        is_second = step > len(VALIDATE)
        begin = len(PART) * is_second + INTERVAL
        left = step + (world > 1) - len(VALIDATE) * is_second
        assert ended[0] == "SIGTERMException"
        assert without_saves(ended[1].steps) == [*WHOLE[:begin], *["validate"] * left]
        assert rest.steps == WHOLE[begin:]
        assert rest.means == straight.means[is_second:]
        assert is_same


@pytest.mark.parametrize("world", [1, 2])
def test_a_validation_that_ends_an_epoch_is_finished(rank_pool, tmp_path, world):
    """The run that resumes has no batch of that epoch to log what callbacks may monitor."""
    arguments = case_of(world, 2), 1, None, False, str(tmp_path)
    results = rank_pool.run(runs.terminated_in_validation, world, *arguments)
    epoch = ["train"] * midway_runs.BATCHES + VALIDATE
    for straight, ended, rest, is_same in results:
        assert ended[0] == "SIGTERMException"
        assert without_saves(ended[1].steps) == epoch
        assert rest.steps == epoch * (midway_runs.EPOCHS - 1)
        assert ended[1].means + rest.means == straight.means
        assert is_same


def without_saves(steps: list[str]) -> list[str]:
    return [step for step in steps if step != "save"]


def test_slurm_does_not_save_in_the_middle_of_a_validation(rank_pool, tmp_path):
    arguments = case_of(2, 2), {2: signal.SIGUSR1}, str(tmp_path)
    for steps, again in rank_pool.run(runs.requeued_in_validation, 2, *arguments):
        at = steps.index("save")
        assert steps[:at] == [*PART, "train"]
        assert without_saves(steps) == WHOLE
        assert again == WHOLE[at:]


def test_slurm_requeues_a_run_that_leaves_a_validation(rank_pool, tmp_path):
    arguments = case_of(2, 2), {1: signal.SIGUSR1, 2: signal.SIGTERM}, str(tmp_path)
    for steps, again in rank_pool.run(runs.requeued_in_validation, 2, *arguments):
        assert steps == [*WHOLE[: INTERVAL + 3], "save"]
        assert again == WHOLE[INTERVAL:]


def test_a_run_that_was_ended_after_its_last_step_resumes_with_nothing_to_do(rank_pool, tmp_path):
    results = rank_pool.run(runs.terminated, 2, case_of(2, 2), ALL, str(tmp_path))
    for ended, done, straight, rest in results:
        assert (ended, done) == ("SIGTERMException", ALL) == (ended, len(straight.losses))
        assert rest.losses == []


def test_no_rank_asks_rank_0_before_each_batch(rank_pool):
    """Lightning does, and the host waits for the device to answer."""
    for counts in rank_pool.run(runs.broadcasts_of_batches, 2, case_of(2, 1)):
        assert counts
        assert set(counts) == {0}


def test_slurm_saves_between_batches_on_all_ranks(rank_pool, tmp_path):
    results = rank_pool.run(runs.requeued, 2, case_of(2, 2), BATCH, str(tmp_path))
    for done, straight, rest in results:
        assert done == len(straight.losses), "requeueing does not end the run by itself"
        assert_goes_on(straight, rest, BATCH + 1)


def test_an_error_leaves_a_checkpoint_and_a_warning_that_it_is_of_half_a_batch(rank_pool, tmp_path):
    results = rank_pool.run(runs.saved_after_error, 2, case_of(2, 2), str(tmp_path))
    for _, done, left in results:
        assert done == 4
        # A loader with a state goes on after the batch in which the error was.
        assert left == midway_runs.BATCHES * midway_runs.EPOCHS - done - 1
    # The best and the last.
    assert sum("in the middle of a training batch" in message for message in results[0][0]) == 2


def test_a_rank_that_fails_alone_does_not_wait_for_ever(rank_pool, tmp_path):
    path = str(tmp_path / "last.ckpt")
    first, second = rank_pool.run(runs.one_comes_to_save, 2, path)
    both, (kind, message) = first
    assert both == ("nothing", "")
    assert kind == "CheckpointError"
    assert "another rank has given up waiting for this one" in message
    (kind, message), both = second
    assert kind == "CheckpointError"
    assert "1 of 2 ranks did not arrive within" in message
    assert path in message
    assert both == ("nothing", "")


def test_the_others_hear_why_a_rank_fails_that_wanted_to_save(rank_pool, tmp_path):
    """And don't save with nobody on the other end."""
    (one, left), (other, _) = rank_pool.run(runs.fails_alone, 2, case_of(2, 2), str(tmp_path))
    assert left == []
    assert "ZeroDivisionError: a bug" in other
    assert other[0].startswith("CheckpointError: ")
    assert "1 of 2 ranks did not arrive" in other[0]
    assert one[0].startswith("CheckpointError: ")
    assert "another rank has given up" in one[0]
    assert any("rank 1 has left the run with ZeroDivisionError: a bug" in text for text in one)
