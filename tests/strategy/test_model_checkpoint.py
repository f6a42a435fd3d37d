"""ModelCheckpoint's options, and loading by the words "best" and "last"."""

from __future__ import annotations

import pytest
from strategy import saving_runs as runs
from strategy.models import Case

CASE = Case(2, 2, 2, steps=5)

OPTIONS = [
    # Scores 3, 1, 2, 0 in epochs 0 to 3; a checkpoint of epoch e has seen e + 1 steps.
    (
        {"monitor": "score", "save_top_k": 2, "filename": "{epoch}", "save_last": True},
        ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"],
        {"best": 4.0, "last": 4.0},
    ),
    (
        {"monitor": "score", "mode": "max", "save_top_k": 1, "filename": "b", "save_last": "link"},
        ["b.ckpt", "last.ckpt"],
        {"best": 1.0, "last": 1.0},
    ),
    (
        {"save_top_k": -1, "every_n_epochs": 2, "filename": "{epoch}", "save_weights_only": True},
        ["epoch=1.ckpt", "epoch=3.ckpt"],
        {"best": 4.0},
    ),
]


@pytest.mark.parametrize(("options", "names", "seen"), OPTIONS, ids=["top-2", "link", "weights"])
def test_options(rank_pool, tmp_path, options, names, seen):
    results = rank_pool.run(runs.with_callback, 2, CASE, str(tmp_path), options, list(seen))
    for result in results:
        assert result.names == names
        assert result.seen == seen
        links = {"last.ckpt": "b.ckpt"} if options.get("save_last") == "link" else {}
        assert result.links == links


def test_every_n_steps_and_resuming_from_last(rank_pool, tmp_path):
    for names, steps in rank_pool.run(runs.interval_then_resume, 2, CASE, str(tmp_path)):
        assert names == ["epoch=1-step=2.ckpt", "epoch=3-step=4.ckpt", "last.ckpt"]
        assert steps == 1


def test_urls_are_refused(rank_pool):
    paths = ["s3://bucket/a.ckpt", "memory://a.ckpt"]
    for errors in rank_pool.run(runs.refused_paths, 2, CASE, paths):
        for (kind, message), path in zip(errors, paths, strict=True):
            assert kind == "CheckpointError"
            assert path in message
            assert "copy the finished directory" in message
