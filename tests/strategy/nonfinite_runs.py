"""What the ranks run in test_nonfinite.py: one bad batch on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from strategy.models import Case, Net, RankBatches, make_batches, make_optimizer
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor
from torch.utils.data import DataLoader

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
