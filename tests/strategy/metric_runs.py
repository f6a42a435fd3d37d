"""What the ranks run in test_metrics_over_ranks.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe import metrics
from lightning_fastmoe.nn import MoE

KINDS = (
    metrics.LoadRatio,
    metrics.LoadCV,
    metrics.DeadExperts,
    metrics.DropRate,
    metrics.RouterEntropy,
    metrics.RouterConfidence,
    metrics.ExpertCoActivation,
)
TOKENS = ((5, 9), (0, 3))
"""Of each rank in each micro-batch."""


def passes(ranks: Sequence[int]) -> list[Tensor]:
    """The micro-batches of these ranks."""
    generator = torch.Generator().manual_seed(5)
    every = [[torch.randn(n, 6, generator=generator) for n in row] for row in TOKENS]
    return [row[rank] for row in every for rank in ranks]


def measure(capacity_factor: float | None) -> dict[str, Tensor]:
    """The metrics over all ranks, each pass replayed by activation checkpointing."""
    dist.init_process_group("gloo")
    return values(capacity_factor, passes([dist.get_rank()]))


def values(capacity_factor: float | None, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The metrics over ``batches``."""
    torch.manual_seed(1)
    # More experts than tokens in a pass, so that some are dead.
    layer = MoE(6, 8, 24, 2, capacity_factor=capacity_factor)
    found = [kind(24) for kind in KINDS]
    for metric in found:
        metric.observe(layer)
    for batch in batches:
        x = batch.clone().requires_grad_()
        (checkpoint(layer, x, use_reentrant=False) * 1.5).sum().backward()
    return {type(metric).__name__: metric.compute() for metric in found}
