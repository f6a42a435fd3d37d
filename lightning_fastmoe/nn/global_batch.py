"""Access to all ranks' tokens in one forward pass, for routers, capacity and losses."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

RESERVED_TOP_K = 8
"""Exchanges reserve room for the counts of this K, so that a callback may raise ``top_k`` to it."""


class GlobalBatch(Protocol):
    """Access to the other ranks' tokens. The global batch is all ranks' batches in rank order.

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
        """The rows ``(T, ...)`` of all ranks, concatenated, and the index of this rank's first one.

        Not differentiable.
        """
        ...

    def near_experts(self, num_experts: int) -> Tensor:
        """(E,) bool on the CPU: the experts of this rank's node."""
        ...


class LocalBatch:
    """The global batch of a single rank, which holds all tokens and all experts."""

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
