"""The optimizer of the demos' models: AdamW, a warm-up, and half a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def adamw_with_cosine(
    module: LightningModule,
    *,
    lr: float,
    min_lr_ratio: float,
    warmup_steps: int,
    weight_decay: float,
    betas: tuple[float, float],
) -> OptimizerLRSchedulerConfig:
    """What ``configure_optimizers`` returns.

    Args:
        module: the model, attached to its Trainer.
        lr: peak learning rate.
        min_lr_ratio: final learning rate as a fraction of ``lr``.
        warmup_steps: steps over which the learning rate rises from 0; a cosine follows, down to
            ``min_lr_ratio`` at the run's last step. A run without an end keeps the peak.
        weight_decay: of matrices; embeddings, norms, temperatures and biases have none.
        betas: decay rates of the averages of the gradient and of its square.
    """
    trainer = module.trainer
    on_gpu = trainer.strategy.root_device.type == "cuda"
    optimizer = torch.optim.AdamW(
        decay_groups(module, weight_decay), lr=lr, betas=betas, fused=on_gpu or None
    )

    def ratio(step: int) -> float:
        return lr_ratio(step, warmup_steps, _total_steps(trainer), min_lr_ratio)

    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, ratio), "interval": "step"},
    }


def lr_ratio(step: int, warmup_steps: int, total: int | None, min_lr_ratio: float) -> float:
    """The learning rate of a step as a fraction of its peak.

    Linear warm-up, then half a cosine down to ``min_lr_ratio`` at step ``total``; None is a run
    without an end, which keeps the peak.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if total is None:
        return 1.0
    progress = (step - warmup_steps) / max(1, total - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return min_lr_ratio + (1.0 - min_lr_ratio) * cosine


def decay_groups(root: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for embeddings, norms, learned temperatures and biases.

    Distinguished by module and name, not by number of dimensions: ZeRO stage 3 flattens parameters.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for module in root.modules():
        exempt = isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            vector = name.endswith(("bias", "log_scale"))
            (no_decay if exempt or vector else decay).append(parameter)
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, or ``None`` if it has no end."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None
