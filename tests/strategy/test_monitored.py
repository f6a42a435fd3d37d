"""Values logged without sync_dist: rank 0's decides on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
from strategy import monitor_runs as runs
from strategy.models import Case

CASE = Case(world=2, ep=2, steps=5)
IN_TRAINING: dict[str, Any] = {"on_step": False, "on_epoch": True}
LOGGING: dict[str, dict[str, Any]] = {
    "training": IN_TRAINING,
    "step": {"on_step": True, "on_epoch": False},
    "validation": {"in_validation": True},
    "rank 0 alone": {**IN_TRAINING, "rank_zero_only": True, "only_rank": 0},
}


@pytest.mark.parametrize("logging", LOGGING)
def test_best_checkpoint_is_rank_0s_on_all_ranks(rank_pool, tmp_path, logging) -> None:
    options: dict[str, Any] = {"monitor": "score", "save_top_k": 2, "filename": "{epoch}_{score}"}
    if logging == "step":
        options["every_n_train_steps"] = 1
    results = rank_pool.run(runs.checkpoints, 2, CASE, str(tmp_path), options, LOGGING[logging])
    kept = {"epoch=1_score=1.0.ckpt": 1.0, "epoch=3_score=0.0.ckpt": 0.0}
    for result in results:
        assert result.files == sorted(kept)
        assert result.kept == kept
        assert result.best == "epoch=3_score=0.0.ckpt"
        assert result.score == 0.0
        assert result.logged == 0.0
    assert [len(result.warned) for result in results] == [1, 0]
    assert "ModelCheckpoint monitors 'score'" in results[0].warned[0]
    assert "sync_dist=True" in results[0].warned[0]


def test_names_that_are_taken_are_counted_identically(rank_pool, tmp_path) -> None:
    """One name for all: by its own scores each rank would replace another file, and wait."""
    options = {"monitor": "score", "save_top_k": 2, "filename": "best"}
    results = rank_pool.run(runs.checkpoints, 2, CASE, str(tmp_path), options, IN_TRAINING)
    assert results[0].kept == results[1].kept
    assert sorted(results[0].kept.values()) == [0.0, 1.0]
    assert all(result.files == sorted(result.kept) for result in results)


def test_a_value_in_the_name_alone(rank_pool, tmp_path) -> None:
    options = {"save_top_k": -1, "filename": "{epoch}_{score}"}
    names = [f"epoch={epoch}_score={float(s)}.ckpt" for epoch, s in enumerate((3, 1, 2, 0))]
    results = rank_pool.run(runs.checkpoints, 2, CASE, str(tmp_path), options, IN_TRAINING)
    for result in results:
        assert result.files == names
        assert result.best == names[-1]


def test_reduced_values_are_left_alone(rank_pool, tmp_path) -> None:
    options = {"monitor": "score", "filename": "{epoch}"}
    logging = {**IN_TRAINING, "sync_dist": True, "reduce_fx": "max"}
    results = rank_pool.run(runs.checkpoints, 2, CASE, str(tmp_path), options, logging)
    for result in results:  # the larger of 3 0, 1 2, 2 1, 0 3
        assert result.best == "epoch=1.ckpt"
        assert result.score == 2.0
        assert result.warned == []


@pytest.mark.parametrize("logging", ["training", "validation"])
def test_early_stopping_by_rank_0(rank_pool, logging) -> None:
    results = rank_pool.run(runs.stopping, 2, CASE, LOGGING[logging])
    for result in results:
        assert result.epochs == 3  # scores 3, 1, 2; rank 1 would have stopped after 0, 2
        assert result.score == 1.0
    assert [len(result.warned) for result in results] == [1, 0]
    assert "EarlyStopping monitors 'score'" in results[0].warned[0]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_plateau_gives_all_ranks_rank_0s_rate(rank_pool, interval) -> None:
    results = rank_pool.run(runs.plateau, 2, CASE, {"interval": interval})
    # Scores 3, 1, 2, 0: the third epoch is without progress.
    late = {"epoch": [1e-2, 1e-2, 1e-2, 5e-3], "step": [1e-2, 1e-2, 5e-3, 5e-3]}
    for result in results:
        assert result.rates == pytest.approx(late[interval])
    assert "ReduceLROnPlateau monitors 'score'" in results[0].warned[0]


def test_a_value_that_rank_0_lacks_is_refused_on_all_ranks(rank_pool, tmp_path) -> None:
    for kind, message in rank_pool.run(runs.one_rank_logs, 2, CASE, str(tmp_path), 1):
        assert kind == "ConfigError"
        assert "'score', which rank 1 has logged but rank 0 has not" in message


def test_a_save_after_an_error_has_rank_0s_name(rank_pool, tmp_path) -> None:
    for ended, files in rank_pool.run(runs.saved_after_an_error, 2, CASE, str(tmp_path)):
        assert ended == "ArithmeticError: as planned"
        assert files == ["epoch=2-score=2.0.ckpt", "last.ckpt"]
