"""Values logged without sync_dist: rank 0's decides on all ranks."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from strategy.models import Case, loss_of
from strategy.resume_runs import Resumed, error_of, trainer_for

from lightning_fastmoe.errors import FastMoEError

SCORES = ((3.0, 1.0, 2.0, 0.0, 4.0), (0.0, 2.0, 1.0, 3.0, 0.5))
"""Rank 1 likes best what rank 0 likes least."""


class Scored(Resumed):
    """Logs each rank's own score of the epoch, in training or after validation."""

    def __init__(self, case: Case, **options: Any) -> None:
        super().__init__(case, "lambda")
        self.options = options
        self.in_validation = self.options.pop("in_validation", False)
        self.plateau: dict[str, Any] | None = self.options.pop("plateau", None)
        self.only_rank: int | None = self.options.pop("only_rank", None)
        self.rates: list[float] = []

    def _log(self, epoch: int) -> None:
        if self.only_rank is None or self.trainer.global_rank == self.only_rank:
            self.log("score", SCORES[self.trainer.global_rank % 2][epoch], **self.options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.in_validation:
            self._log(self.trainer.current_epoch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss_of(self.net, batch)
        if self.in_validation:
            self._log(self.trainer.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-2)
        if self.plateau is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        config = {"scheduler": schedule, "monitor": "score", **self.plateau}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_epoch_end(self) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])


@dataclass
class Decided:
    """What a rank made of its values."""

    files: list[str] = field(default_factory=list)
    best: str = ""
    score: float | None = None
    kept: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    rates: list[float] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    logged: float | None = None


def _fit(module: Scored, callbacks: list[pl.Callback], epochs: int = 4) -> tuple[Any, list[str]]:
    pl.seed_everything(7, verbose=False)
    keeps = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    options: dict[str, Any] = {"limit_val_batches": 1.0} if module.in_validation else {}
    trainer = trainer_for(
        module.case, epochs, callbacks=callbacks, enable_checkpointing=keeps, **options
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    texts = [str(warning.message) for warning in caught]
    return trainer, [text for text in texts if "Rank 0's value is used" in text]


def checkpoints(
    case: Case, folder: str, options: dict[str, Any], logging: dict[str, Any]
) -> Decided:
    """Keeps the best of four epochs."""
    callback = ModelCheckpoint(folder, **options)
    trainer, warned = _fit(Scored(case, **logging), [callback])
    trainer.strategy.barrier()  # rank 0 alone deletes
    score = callback.best_model_score
    return Decided(
        files=sorted(os.listdir(folder)),
        best=Path(callback.best_model_path).name,
        score=None if score is None else float(score),
        kept={Path(name).name: float(value) for name, value in callback.best_k_models.items()},
        warned=warned,
        logged=float(trainer.callback_metrics["score"]),
    )


def stopping(case: Case, logging: dict[str, Any]) -> Decided:
    """Stops at the first epoch without progress: by rank 0's values the third of five."""
    callback = EarlyStopping("score", patience=1)
    trainer, warned = _fit(Scored(case, **logging), [callback], 5)
    return Decided(epochs=trainer.current_epoch, score=float(callback.best_score), warned=warned)


def plateau(case: Case, config: dict[str, Any]) -> Decided:
    """Halves the rate after each epoch without progress."""
    module = Scored(case, plateau=config, on_step=config.get("interval") == "step", on_epoch=True)
    _, warned = _fit(module, [])
    return Decided(rates=module.rates, warned=warned)


def one_rank_logs(case: Case, folder: str, rank: int) -> Any:
    """Only one rank logs what decides."""
    callback = ModelCheckpoint(folder, monitor="score")
    module = Scored(case, only_rank=rank, rank_zero_only=rank == 0)
    error = error_of(_fit, module, [callback])
    return error or callback.best_model_path


class Failing(Scored):
    """Fails on all ranks in the third epoch, when it has logged its score."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 2:
            self._log(2)
            raise ArithmeticError("as planned")
        return super().training_step(batch, batch_idx)


def saved_after_an_error(case: Case, folder: str) -> tuple[Any, list[str]]:
    """A save whose name has the value in it, when ranks can't ask each other any more."""
    options: dict[str, Any] = {"save_on_exception": True, "every_n_epochs": 100}
    callback = ModelCheckpoint(folder, filename="{epoch}-{score:.1f}", save_last=True, **options)
    try:
        _fit(Failing(case, on_step=True, on_epoch=False), [callback])
        ended = "nothing"
    except (ArithmeticError, FastMoEError) as error:
        ended = f"{type(error).__name__}: {error}"
    return ended, sorted(os.listdir(folder))


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
    results = rank_pool.run(checkpoints, 2, CASE, str(tmp_path), options, LOGGING[logging])
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
    results = rank_pool.run(checkpoints, 2, CASE, str(tmp_path), options, IN_TRAINING)
    assert results[0].kept == results[1].kept
    assert sorted(results[0].kept.values()) == [0.0, 1.0]
    assert all(result.files == sorted(result.kept) for result in results)


def test_a_value_in_the_name_alone(rank_pool, tmp_path) -> None:
    options = {"save_top_k": -1, "filename": "{epoch}_{score}"}
    names = [f"epoch={epoch}_score={float(s)}.ckpt" for epoch, s in enumerate((3, 1, 2, 0))]
    results = rank_pool.run(checkpoints, 2, CASE, str(tmp_path), options, IN_TRAINING)
    for result in results:
        assert result.files == names
        assert result.best == names[-1]


def test_reduced_values_are_left_alone(rank_pool, tmp_path) -> None:
    options = {"monitor": "score", "filename": "{epoch}"}
    logging = {**IN_TRAINING, "sync_dist": True, "reduce_fx": "max"}
    results = rank_pool.run(checkpoints, 2, CASE, str(tmp_path), options, logging)
    for result in results:  # the larger of 3 0, 1 2, 2 1, 0 3
        assert result.best == "epoch=1.ckpt"
        assert result.score == 2.0
        assert result.warned == []


@pytest.mark.parametrize("logging", ["training", "validation"])
def test_early_stopping_by_rank_0(rank_pool, logging) -> None:
    results = rank_pool.run(stopping, 2, CASE, LOGGING[logging])
    for result in results:
        assert result.epochs == 3  # scores 3, 1, 2; rank 1 would have stopped after 0, 2
        assert result.score == 1.0
    assert [len(result.warned) for result in results] == [1, 0]
    assert "EarlyStopping monitors 'score'" in results[0].warned[0]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_plateau_gives_all_ranks_rank_0s_rate(rank_pool, interval) -> None:
    results = rank_pool.run(plateau, 2, CASE, {"interval": interval})
    # Scores 3, 1, 2, 0: the third epoch is without progress.
    late = {"epoch": [1e-2, 1e-2, 1e-2, 5e-3], "step": [1e-2, 1e-2, 5e-3, 5e-3]}
    for result in results:
        assert result.rates == pytest.approx(late[interval])
    assert "ReduceLROnPlateau monitors 'score'" in results[0].warned[0]


def test_a_value_that_rank_0_lacks_is_refused_on_all_ranks(rank_pool, tmp_path) -> None:
    for kind, message in rank_pool.run(one_rank_logs, 2, CASE, str(tmp_path), 1):
        assert kind == "ConfigError"
        assert "'score', which rank 1 has logged but rank 0 has not" in message


def test_a_save_after_an_error_has_rank_0s_name(rank_pool, tmp_path) -> None:
    for ended, files in rank_pool.run(saved_after_an_error, 2, CASE, str(tmp_path)):
        assert ended == "ArithmeticError: as planned"
        assert files == ["epoch=2-score=2.0.ckpt", "last.ckpt"]
