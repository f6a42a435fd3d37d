"""What the ranks run in test_plain_loading.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from strategy.expert_modules import build_modules
from strategy.models import Case, build_net, loss_of, make_batches, make_optimizer
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Counter(nn.Module):
    """A module with an extra state."""

    count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


class Plain(pl.LightningModule):
    """A module as users write it, with hyperparameters and hooks; no class of ours but MoE."""

    def __init__(self, experts: str = "stacked", width: int = 3, origin: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        coefficients = (0.01, 0.001)
        self.net = (
            build_net((4, 8), coefficients) if experts == "stacked" else build_modules(experts)
        )
        self.extra = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.extra.weight
        self.counter = Counter()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.loaded: dict[str, Any] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += 1
        self.counter.count += 1
        return loss_of(self.net, batch) + self.extra.weight.square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = (1, 2)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = {"mine": checkpoint["mine"], "epoch": checkpoint["epoch"]}


class Data(pl.LightningDataModule):
    """Its state is in the checkpoint."""

    def __init__(self, case: Case, place: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="case")
        self.case, self.place = case, place

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank = self.trainer.global_rank
        return DataLoader(list(make_batches(self.case)[:, 0, rank]), batch_size=None)

    val_dataloader = train_dataloader

    def state_dict(self) -> dict[str, int]:
        return {"place": 7}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def train(case: Case, path: str, hyperparameters: dict[str, Any]) -> dict[str, Tensor]:
    """Three steps, then saves; the weights of all experts."""
    pl.seed_everything(5, verbose=False)
    module = Plain(**hyperparameters)
    weights: dict[str, Tensor] = {}

    class AtEnd(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            weights.update({n: w.cpu() for n, w in whole_weights(pl_module).items()})

    trainer = make_trainer(case, callbacks=[AtEnd()])
    trainer.fit(module, datamodule=Data(case))
    trainer.save_checkpoint(path)
    return weights
