"""What test_waits.py runs: where a training step waits for the device."""

from __future__ import annotations

import traceback
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_fastmoe import FastMoEStrategy, MoE

STEPS = 5


class Small(pl.LightningModule):
    """Two layers with a balancing loss and a router bias that is updated after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 64),
            MoE(64, 128, 8, top_k=2, load_balancing=0.01),
            MoE(64, 128, 8, top_k=2, router="sigmoid"),
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(32, 64, generator=generator) for _ in range(STEPS)]
        return torch.utils.data.DataLoader(batches, batch_size=None)


class Waits(pl.Callback):
    """Records the stack of each wait between the start and the end of a batch.

    CUDA's debug mode warns of copies to the host and the like, but not of calls that do nothing but
    wait; those are replaced.
    """

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self._within = False
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            owner.synchronize = self._noted(owner.synchronize)
        warnings.showwarning = self._note_warning

    def on_train_batch_start(self, *args: Any) -> None:
        self.steps.append([])
        self._within = True
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._within = False

    def _noted(self, wait: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._note()
            return wait(*args, **kwargs)

        return noted

    def _note_warning(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self._note()

    def _note(self) -> None:
        if self._within:
            frames = traceback.extract_stack()[:-2]
            self.steps[-1].append(" < ".join(f"{f.name}:{f.lineno}" for f in frames[::-1][:8]))


def waits(stage: int, precision: str) -> list[list[str]]:
    """For each step, where it waited."""
    warnings.simplefilter("always")
    recorder = Waits()
    trainer = pl.Trainer(
        accelerator="cuda",
        devices=1,
        strategy=FastMoEStrategy(stage=stage),
        precision=precision,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(Small())
    return recorder.steps
