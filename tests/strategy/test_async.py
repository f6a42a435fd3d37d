"""Saving in the background: the state of the moment, and errors that are not lost."""

from __future__ import annotations

import pytest
import torch
from strategy import background_runs, midway_runs
from strategy import saving_runs as runs
from strategy.contents import assert_same_files
from strategy.models import Case

from lightning_fastmoe.checkpoint import CheckpointReader

CASE = Case(2, 2, 2, steps=5)


def test_training_goes_on_and_the_checkpoint_is_of_the_moment(rank_pool, tmp_path):
    results = rank_pool.run(runs.saved_while_training, 2, CASE, str(tmp_path))
    for there, with_async, without in results:
        assert len(there) == 4
        assert not there[1], "training has waited for the checkpoint"
        for name, weight in without.items():
            assert torch.equal(with_async[name], weight), name
    with (
        CheckpointReader(tmp_path / "async.ckpt") as one,
        CheckpointReader(tmp_path / "sync.ckpt") as other,
    ):
        one.verify()
        assert one.manifest.progress == other.manifest.progress
        assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
        for name in one.manifest.tensors:
            assert torch.equal(one.read(name), other.read(name)), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_later_steps_are_not_in_the_files(rank_pool, tmp_path, stage):
    """The thread reads what it writes only after two more steps; the files are the same bytes."""
    case = Case(2, 2, stage, midway_runs.ACCUMULATE, epochs=midway_runs.EPOCHS)
    waited, went_on = (
        {n: str(tmp_path / f"{kind}-{n}.ckpt") for n in (2, 8)} for kind in ("waited", "went-on")
    )
    for pair in rank_pool.run(background_runs.both_kinds, 2, case, waited, went_on):
        assert len(pair.ahead) == 2, "training did not go on beside the thread"
        assert pair.went_on.losses == pair.waited.losses
        assert pair.went_on.norms == pair.waited.norms
        assert all(torch.equal(pair.went_on.weights[n], w) for n, w in pair.waited.weights.items())
    for n in waited:
        assert_same_files(waited[n], went_on[n])


def test_an_error_surfaces_at_the_next_step_and_the_older_one_stays(rank_pool, tmp_path):
    results = rank_pool.run(runs.failing_in_background, 2, CASE, str(tmp_path))
    assert len({error for error, _, _ in results}) == 1
    assert len({steps for _, steps, _ in results}) == 1
    for (kind, message), steps, left in results:
        assert kind == "CheckpointError"
        assert "epoch=1.ckpt could not be saved: rank 1 failed" in message
        assert "No space left on device" in message
        assert steps == 2
        assert left == ["epoch=0.ckpt"]
    with CheckpointReader(tmp_path / "epoch=0.ckpt") as reader:
        reader.verify()


def test_an_error_of_the_last_save_is_not_lost(rank_pool, tmp_path):
    for errors in rank_pool.run(runs.failing_at_the_end, 2, CASE, str(tmp_path)):
        for kind, message in errors:
            assert kind == "CheckpointError"
            assert "broken" in message


def test_ctrl_c_while_a_save_is_waited_for_makes_it_no_success(rank_pool):
    (events,) = rank_pool.run(background_runs.interrupted_waits, 1)
    once = ["interrupted", "still pending", "written", "the older one is deleted"]
    assert events == once * 2


def test_links_to_what_is_being_written_are_refused(rank_pool, tmp_path):
    for kind, message in rank_pool.run(runs.linked, 2, CASE, str(tmp_path)):
        assert kind == "ConfigError"
        assert "save_last='link'" in message
