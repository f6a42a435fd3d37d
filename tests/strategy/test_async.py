"""Saving in the background: the state of the moment, and errors that are not lost."""

from __future__ import annotations

import torch
from strategy import saving_runs as runs
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


def test_links_to_what_is_being_written_are_refused(rank_pool, tmp_path):
    for kind, message in rank_pool.run(runs.linked, 2, CASE, str(tmp_path)):
        assert kind == "ConfigError"
        assert "save_last='link'" in message
