"""What the ranks run in test_monitored.py: values that each rank logs for itself."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
