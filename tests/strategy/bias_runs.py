"""What the ranks run in test_bias_midway.py: balance biases over a save in the middle of a step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from strategy.midway_runs import BATCHES, EPOCHS, Batches
from strategy.models import D_IN, D_MODEL, Case
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE, RouterBiasBalancing


class Biased(pl.LightningModule):
    """One layer whose router has a bias."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.embed = nn.Linear(D_IN, D_MODEL)
        self.moe = MoE(D_MODEL, 20, 4, top_k=2, router="sigmoid", load_balancing=0.0)
        self.head = nn.Linear(D_MODEL, 1)
        self.poison = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.poison:
            batch = batch * torch.nan
        h = self.embed(batch)
        return (self.head(h + self.moe(h)) - batch.sum(-1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)

    def train_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank, self.case.world, 0.0)


class Save(pl.Callback):
    """Saves after so many batches; notes what was counted then, and when training starts."""

    def __init__(self, saves: dict[int, str]) -> None:
        self.saves, self.batches = saves, 0
        self.counts: list[list[int]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.counts.append(pl_module.moe.router.load_since_update.tolist())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches += 1
        if self.batches in self.saves:
            self.counts.append(pl_module.moe.router.load_since_update.tolist())
            trainer.save_checkpoint(self.saves[self.batches])


def fit(
    case: Case, saves: dict[int, str], path: str | None = None, poison: int = -1
) -> tuple[Tensor, dict[str, Tensor], list[list[int]]]:
    """The biases and weights in the end, and counts. The saves come before the biases move."""
    pl.seed_everything(7, verbose=False)
    module = Biased(case)
    module.poison = poison
    save = Save(saves)
    trainer = make_trainer(
        case,
        max_epochs=EPOCHS,
        max_steps=-1,
        gradient_clip_val=None,
        callbacks=[save, RouterBiasBalancing(0.05)],
    )
    trainer.fit(module, ckpt_path=path)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == BATCHES * EPOCHS
    return module.moe.router.balance_bias, whole_weights(module), save.counts


def fit_error(case: Case, path: str) -> str:
    """The error of a run that resumes in a step of which a part was not finite."""
    try:
        fit(case, {}, path)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "no error"


def poisoned(case: Case, path: str) -> str:
    """The error of a run in whose step a part is not finite; saved after that part."""
    try:
        fit(case, {2: path}, poison=0)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "no error"
