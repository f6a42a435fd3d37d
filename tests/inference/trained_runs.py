"""Trains a model with sharded experts on several ranks, for test_offload_directories.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from inference.offload_models import KINDS, Scorer, loader
from torch import Tensor, nn

from lightning_fastmoe import FastMoEStrategy, OffloadDDPStrategy
from lightning_fastmoe.errors import CheckpointError


class Factor(nn.Module):
    """Multiplies by a number that is a tensor of its extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.ones(())

    def get_extra_state(self) -> Tensor:
        return self.factor.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.factor = state

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Trained(Scorer):
    """Can be trained, and has states of its own, a tensor and another."""

    def __init__(self, kind: str) -> None:
        super().__init__(KINDS[kind])
        self.note = "new"
        self.factor = Factor()

    def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.factor(super().predict_step(x, batch_idx))

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        self.note, self.factor.factor = "trained", torch.tensor(3.0)
        return (self.predict_step(x, batch_idx) - x.sin()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


class Edits(Trained):
    """Changes a checkpoint before it is loaded."""

    edit: Any = staticmethod(lambda weights: None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.edit(checkpoint["state_dict"])


def _names(weights: dict[str, Any], part: str) -> list[str]:
    found = [name for name in weights if part in name]
    assert found
    return found


EDITS: dict[str, Any] = {
    "": lambda weights: None,
    "in place": lambda weights: [weights[n].mul_(2) for n in _names(weights, ".experts.")],
    "replaced": lambda weights: weights.update(
        {n: 2 * weights[n] for n in _names(weights, ".experts.")}
    ),
    "norm": lambda weights: weights["network.norm.weight"].mul_(2),
}


def quiet(strategy: Any, devices: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def train(kind: str, path: str) -> None:
    """Two ranks have half of the experts each."""
    trainer = quiet(FastMoEStrategy(expert_parallel_size=2), 2, max_steps=3)
    trainer.fit(Trained(kind), loader())
    trainer.save_checkpoint(path)


def predict(kind: str, path: str, edit: str = "") -> tuple[list[Tensor], str]:
    """On several processes that share experts; the outputs are this rank's, or an error's text."""
    module = Edits(kind)
    module.edit = EDITS[edit]
    trainer = quiet(OffloadDDPStrategy(), 2, use_distributed_sampler=False)
    try:
        found: Any = trainer.predict(module, loader(), ckpt_path=path)
    except CheckpointError as error:
        return [], str(error)
    return found, module.note
