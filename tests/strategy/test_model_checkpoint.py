"""ModelCheckpoint's options, and loading by the words "best" and "last"."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from strategy import saving_runs as runs
from strategy.models import Case

CASE = Case(2, 2, 2, steps=5)

STEPS = ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]

# Scores 3, 1, 2, 0 in epochs 0 to 3; a checkpoint of epoch e has seen e + 1 steps.
OPTIONS = {
    "top-2": (
        {"monitor": "score", "save_top_k": 2, "filename": "{epoch}", "save_last": True},
        ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"],
        {"best": 4.0, "last": 4.0},
    ),
    "link": (
        {"monitor": "score", "mode": "max", "save_top_k": 1, "filename": "b", "save_last": "link"},
        ["b.ckpt", "last.ckpt"],
        {"best": 1.0, "last": 1.0},
    ),
    "weights": (
        {"save_top_k": -1, "every_n_epochs": 2, "filename": "{epoch}", "save_weights_only": True},
        ["epoch=1.ckpt", "epoch=3.ckpt"],
        {"best": 4.0},
    ),
    "interval of time": (
        {"train_time_interval": timedelta(0), "save_top_k": -1, "filename": "{step}"},
        STEPS,
        {"best": 4.0},
    ),
    "end of the epoch": (
        {"save_on_train_epoch_end": True, "save_top_k": -1, "filename": "{step}"},
        STEPS,
        {"best": 4.0},
    ),
    "one name": (
        {"monitor": "score", "save_top_k": 3, "filename": "b"},
        # Epochs 0, 1, 2; the worst, of epoch 0, is replaced by epoch 3.
        ["b-v1.ckpt", "b-v2.ckpt", "b.ckpt"],
        {"best": 4.0},
    ),
    "one name, best first": (
        {"monitor": "score", "mode": "max", "save_top_k": 2, "filename": "b"},
        # Epochs 0, 1; epoch 2 replaces epoch 1.
        ["b-v1.ckpt", "b.ckpt"],
        {"best": 1.0},
    ),
    "one name, no counter": (
        {"save_top_k": -1, "filename": "b", "enable_version_counter": False},
        ["b.ckpt"],
        {"best": 4.0},
    ),
    "names of values": (
        {
            **{"monitor": "score", "save_top_k": 2, "filename": "{epoch}_{score:.1f}"},
            "auto_insert_metric_name": False,
        },
        ["1_1.0.ckpt", "3_0.0.ckpt"],
        {"best": 4.0},
    ),
}
BACKGROUND = ["top-2", "interval of time", "one name", "one name, best first"]


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options(rank_pool, tmp_path, name):
    options, names, seen = OPTIONS[name]
    results = rank_pool.run(runs.with_callback, 2, CASE, str(tmp_path), options, list(seen))
    for result in results:
        assert result.names == names
        assert result.seen == seen
        links = {"last.ckpt": "b.ckpt"} if options.get("save_last") == "link" else {}
        assert result.links == links


@pytest.mark.parametrize("name", BACKGROUND)
def test_options_in_the_background(rank_pool, tmp_path, name):
    """Each save is still being written when the next one asks which names are taken."""
    options, names, seen = OPTIONS[name]
    case = replace(CASE, extra={"async_checkpoint": True})
    more = ({}, 0.15)
    results = rank_pool.run(runs.with_callback, 2, case, str(tmp_path), options, list(seen), *more)
    for result in results:
        assert result.names == names
        assert result.seen == seen


def test_saving_after_validation(rank_pool, tmp_path):
    """Validation comes before the end of the epoch, and steps_seen counts training steps."""
    options = {"save_on_train_epoch_end": False, "save_top_k": -1, "monitor": "val_loss"}
    options["filename"] = "{step}"
    more = ({"limit_val_batches": 1.0, "check_val_every_n_epoch": 2}, 0.0)
    results = rank_pool.run(runs.with_callback, 2, CASE, str(tmp_path), options, ["best"], *more)
    for result in results:
        assert result.names == ["step=2.ckpt", "step=4.ckpt"]
        assert result.seen["best"] == float(result.best[len("step=")])


def test_every_n_steps_and_resuming_from_last(rank_pool, tmp_path):
    for names, steps in rank_pool.run(runs.interval_then_resume, 2, CASE, str(tmp_path)):
        assert names == ["epoch=1-step=2.ckpt", "epoch=3-step=4.ckpt", "last.ckpt"]
        assert steps == 1


def test_urls_are_refused(rank_pool):
    paths = ["s3://bucket/a.ckpt", "memory://a.ckpt"]
    for errors in rank_pool.run(runs.refused_paths, 2, CASE, paths):
        for (kind, message), path in zip(errors, [*paths, "memory://"], strict=True):
            assert kind == "CheckpointError"
            assert path in message
            assert "copy the finished directory" in message


def test_the_last_one_is_not_overlooked_where_a_save_died_between_two_renames(rank_pool, tmp_path):
    for (kind, message), steps in rank_pool.run(runs.without_a_name, 2, CASE, str(tmp_path)):
        assert kind == "CheckpointError"
        assert f"{tmp_path}/last.ckpt" in message
        assert "Start again" in message
        assert steps == 1
