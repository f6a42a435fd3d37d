"""A small model for tests of callbacks on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe.nn import MoE, moe_losses

TOKENS, BATCH, D_MODEL, D_FFN = 6, 2, 8, 16


class Model(pl.LightningModule):
    """An embedding, two MoE layers of different sizes, and a readout."""

    def __init__(self, steps: int = 8, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.steps = steps
        self.embedding = nn.Embedding(11, D_MODEL)
        self.first = MoE(D_MODEL, D_FFN, 4, 2, activation="relu", **options)
        self.second = MoE(D_MODEL, D_FFN, 6, 1, activation="relu")
        self.readout = nn.Linear(D_MODEL, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.first(x)
        logits: Tensor = self.readout(x + self.second(x))
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch).flatten(0, 1), batch.flatten())
        # By hand, since some of these runs accumulate gradients without FastMoEStrategy.
        return loss + sum(moe_losses(self).values())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def _data(self, batches: int) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(1)
        data = torch.randint(11, (batches * BATCH, TOKENS), generator=generator)
        return DataLoader(data, batch_size=BATCH)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self._data(self.steps)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._data(2)


def make_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU process."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 2,
        "limit_val_batches": 0,
        "max_epochs": 1,
    }
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), **{**defaults, **options}
    )


class SaveAt(pl.Callback):
    """Saves a checkpoint within the epoch, after an optimizer step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
