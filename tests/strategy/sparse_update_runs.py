"""What the ranks run in test_sparse_update.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from strategy.models import Case, Net
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor

from lightning_fastmoe import SparseUpdate
from lightning_fastmoe.errors import FastMoEError

Weights = dict[str, Tensor]


class Norms(pl.Callback):
    """Gradient norms, and the whole weights before training and after each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.weights: list[Weights] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_weights(pl_module.net))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))
        self.weights.append(whole_weights(pl_module.net))


def train(
    case: Case, options: dict[str, Any], load: str | None = None, save: str | None = None
) -> tuple[list[float], list[Weights], int]:
    """Norms, weights, and how many elements this rank's optimizer has a first moment of."""
    pl.seed_everything(7, verbose=False)
    notes = Norms()
    trainer = make_trainer(case, callbacks=[SparseUpdate(**options), notes])
    trainer.fit(Net(case), ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    state = trainer.strategy.deepspeed_engine.optimizer.optimizer.state
    return notes.norms, notes.weights, sum(s["exp_avg"].numel() for s in state.values())


def error_of(case: Case, options: dict[str, Any], load: str) -> str | None:
    """The error of a run that resumes with other options."""
    try:
        train(case, options, load)
    except FastMoEError as error:
        return str(error)
    return None
