"""What the ranks run in test_causal_lm.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.lm import MoECausalLM

VOCAB, LENGTH = 61, 9


def batch_of(rank: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(rank))
    labels = tokens.clone()
    labels[:, :3] = -100
    return {"input_ids": tokens, "labels": labels}


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def finetune(
    weights: str, saved: str, stage: int, lr: float, world: int
) -> tuple[list[float], int]:
    """Two steps on the same batch; returns (losses, experts of the first layer on this rank)."""
    torch.manual_seed(5)
    module, losses = MoECausalLM(weights, lr=lr, load_balancing=0.0), Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FastMoEStrategy(expert_parallel_size=world, stage=stage),
        max_steps=2,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [batch_of(trainer.global_rank)] * 2
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert module.network is not None
    experts = module.network.model.layers[0].mlp.experts.num_local_experts
    trainer.save_checkpoint(saved)
    return losses.losses, experts
