"""What the ranks run in test_nonfinite.py: one bad batch on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from strategy.models import (
    D_FFN,
    D_MODEL,
    Case,
    Net,
    RankBatches,
    make_batches,
    make_optimizer,
)
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fastmoe import MoE, RouterBiasBalancing
from lightning_fastmoe.errors import NonFiniteError


class Bad(Net):
    """A batch of rank 1 holds one NaN; or the step with that batch is left out.

    Args:
        case: with the policy in ``extra``.
        bad_step: the step of the bad batch, or None.
        bad_micro: which of the step's micro-batches is bad.
        left_out: the step that does not happen, or None.
    """

    def __init__(
        self, case: Case, bad_step: int | None, bad_micro: int, left_out: int | None
    ) -> None:
        super().__init__(case)
        self.bad_step, self.bad_micro, self.left_out = bad_step, bad_micro, left_out

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.net)

    def train_dataloader(self) -> DataLoader[Tensor]:
        batches = make_batches(self.case)[:, :, self.trainer.global_rank].clone()
        if self.bad_step is not None and self.trainer.global_rank == 1:
            batches[self.bad_step, self.bad_micro, 0, 0, 0] = torch.nan
        if self.left_out is not None:
            batches = torch.cat([batches[: self.left_out], batches[self.left_out + 1 :]])
        return DataLoader(RankBatches(batches.flatten(0, 1)), batch_size=None)


class Biased(Bad):
    """With a router whose bias is moved after each step."""

    def __init__(self, case: Case, bad_step: int | None, left_out: int | None) -> None:
        super().__init__(case, bad_step, 0, left_out)
        layer = MoE(D_MODEL, D_FFN, 8, 2, router="sigmoid", load_balancing=0.0)
        assert self.net is not None
        self.net["moes"] = torch.nn.ModuleList([layer])
        self.at_the_end: dict[str, Tensor] = {}

    def on_train_end(self) -> None:
        bias = self.net["moes"][0].router.balance_bias.clone()
        self.at_the_end = {**whole_weights(self.net), "bias": bias}


def moved(case: Case, bad: int | None, left_out: int | None, averaged: bool) -> dict[str, Tensor]:
    """Weights and the router's bias at the end, or their averages."""
    pl.seed_everything(7, verbose=False)
    module = Biased(case, bad, left_out)
    callbacks = [RouterBiasBalancing(0.05)]
    if averaged:
        callbacks.append(EMAWeightAveraging(decay=0.6))
    make_trainer(case, callbacks=callbacks, max_steps=-1, max_epochs=1).fit(module)
    return module.at_the_end


def moved_twice(case: Case) -> list[dict[str, Tensor]]:
    """The averages of two trainings that have one callback."""
    average, found = EMAWeightAveraging(decay=0.6), []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        module = Biased(case, None, None)
        make_trainer(case, callbacks=[average], max_steps=-1, max_epochs=1).fit(module)
        found.append(module.at_the_end)
    return found


@dataclass
class Result:
    """Weights after each step, and the error if there was one."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    error: str = ""
    losses: list[float] = field(default_factory=list)
    at_the_end: dict[str, Tensor] = field(default_factory=dict)


class Weights(pl.Callback):
    """Notes the weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if len(self.steps) < trainer.global_step:
            self.steps.append(whole_weights(pl_module.net))


def fit(
    case: Case, bad_step: int | None = None, bad_micro: int = 0, left_out: int | None = None
) -> Result:
    """Trains on all steps but ``left_out``."""
    pl.seed_everything(7, verbose=False)
    module, weights = Bad(case, bad_step, bad_micro, left_out), Weights()
    trainer = make_trainer(case, callbacks=[weights], max_steps=-1, max_epochs=1)
    result = Result(weights.steps)
    try:
        trainer.fit(module)
    except NonFiniteError as error:
        result.error = str(error)
    result.losses = module.batch_losses
    result.at_the_end = whole_weights(module.net)
    return result
