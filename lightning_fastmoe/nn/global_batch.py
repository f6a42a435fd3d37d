"""The tokens of all ranks in one forward pass, as a router, a capacity or a loss may need them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

RESERVED_TOP_K = 8
"""Exchanges have room for the counts of this K, so that a callback may raise ``top_k`` up to it."""


class GlobalBatch(Protocol):
    """Reaches the other ranks' tokens. The global batch is the ranks' batches in rank order.

    Every rank must call the same methods in the same order.

    Attributes:
        rank: this rank.
        size: number of ranks, R.
        num_expert_ranks: ranks over which a layer's experts are split.
    """

    rank: int
    size: int
    num_expert_ranks: int

    def gather_counts(self, counts: Tensor, layer: str) -> Tensor:
        """``(n,)`` non-negative int64 of each rank -> ``(R, n)``, on any device."""
        ...

    def gather_rows(self, rows: Tensor, layer: str) -> tuple[Tensor, int]:
        """``(T, ...)`` of each rank, one after the other; and where this rank's rows begin.

        Not differentiable.
        """
        ...

    def near_experts(self, num_experts: int) -> Tensor:
        """(E,) bool on the CPU: the experts of this rank's node."""
        ...


class LocalBatch:
    """One rank, which holds all tokens and all experts."""

    rank = 0
    size = 1
    num_expert_ranks = 1

    def gather_counts(self, counts: Tensor, layer: str) -> Tensor:
        """See :class:`GlobalBatch`."""
        return counts.unsqueeze(0)

    def gather_rows(self, rows: Tensor, layer: str) -> tuple[Tensor, int]:
        """See :class:`GlobalBatch`."""
        return rows, 0

    def near_experts(self, num_experts: int) -> Tensor:
        """See :class:`GlobalBatch`."""
        return torch.ones(num_experts, dtype=torch.bool)
