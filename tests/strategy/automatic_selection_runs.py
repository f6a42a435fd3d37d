"""What the ranks run in test_automatic_selection.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from strategy.models import Case, Net, loss_of, make_batches
from strategy.sparse_experts_runs import Experts, Notes, Weights
from strategy.tracing import make_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fastmoe import SparseUpdate
from lightning_fastmoe.errors import FastMoEError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts.trained import trained_of


class Broken(Net):
    """Its data can't be read on rank 1."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        if self.trainer.global_rank == 1:
            raise OSError("no such file")
        return super().train_dataloader()


class Short(Net):
    """Has one batch less on rank 1."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        loader = super().train_dataloader()
        batches: Any = loader.dataset
        if self.trainer.global_rank == 1:
            batches.batches = batches.batches[:-1]
        return loader


class NoStep(Net):
    """Its step fails on rank 1 before a layer."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.trainer.global_rank == 1 and not self.training:
            raise ValueError("a bad batch")
        return super().training_step(batch, batch_idx)


KINDS = {"net": Net, "broken": Broken, "short": Short, "no step": NoStep}


def train(
    case: Case, experts: Any, load: str | None = None, save: str | None = None, kind: str = "net",
    **options: Any,
) -> tuple[Experts, list[Weights], list[float]]:  # fmt: skip
    """The experts that a run trained, its weights by step, and its losses."""
    pl.seed_everything(7, verbose=False)
    notes = Notes()
    trainer = make_trainer(case, callbacks=[SparseUpdate(experts=experts, **options), notes])
    module = KINDS[kind](case)
    trainer.fit(module, ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    parts = {name: trained_of(layer.experts.holder) for name, layer in expert_layers(module)}
    chosen = {name: list(part.expert_ids) for name, part in parts.items() if part is not None}
    return chosen, notes.weights, module.batch_losses


def error_of(*args: Any, **options: Any) -> str:
    """The error of a run, of whichever kind."""
    try:
        train(*args, **options)
    except (FastMoEError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def all_batches(case: Case, number: int) -> Tensor:
    """The first batches of all ranks."""
    return make_batches(case).flatten(0, 1)[:number].flatten(0, 1)


def run(net: Any) -> Any:
    """Runs a network on a batch."""
    return lambda batch: loss_of(net, torch.as_tensor(batch))
