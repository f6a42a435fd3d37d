"""Trains a model with sharded experts on several ranks, for test_offload_directories.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from inference.offload_models import KINDS, Scorer, loader
from torch import Tensor

from lightning_fastmoe import FastMoEStrategy, OffloadDDPStrategy


class Trained(Scorer):
    """Can be trained, and has a state that is no tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__(KINDS[kind])
        self.note = "new"

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        self.note = "trained"
        return (self.predict_step(x, batch_idx) - x.sin()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


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


def predict(kind: str, path: str) -> tuple[list[Tensor], str]:
    """On several processes that share experts; the outputs are this rank's."""
    module = Trained(kind)
    trainer = quiet(OffloadDDPStrategy(), 2, use_distributed_sampler=False)
    found: Any = trainer.predict(module, loader(), ckpt_path=path)
    return found, module.note
