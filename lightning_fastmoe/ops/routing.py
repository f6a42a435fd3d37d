"""Which expert gets which token: top-k, tokens_per_expert, and the expert-major order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertOrder:
    """A stable order of the T*K (token, slot) pairs by expert, then token, then slot.

    Example with T=3, K=2 and ``expert_ids = [[1, 0], [1, 2], [0, 1]]``: flat pairs 0..5 go to
    experts 1 0 1 2 0 1, so ``order = [1, 4, 0, 2, 5, 3]`` (pairs of expert 0, then 1, then 2),
    ``inverse = [2, 0, 3, 5, 1, 4]`` and ``tokens_per_expert = [2, 3, 1]``.

    Attributes:
        order: (T*K,) int64, the pair that stands in each expert-major row.
        inverse: (T*K,) int64, the row of each pair.
        tokens_per_expert: (E,) int64.
    """

    order: Tensor
    inverse: Tensor
    tokens_per_expert: Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best experts of each token, best first, ties to the lower expert id.

    ``torch.topk`` leaves the order of ties open (and it differs between devices); a stable sort
    does not, and E is small.

    Args:
        scores: (T, E), any floating dtype.
        k: experts per token.

    Returns:
        (T, K) int64.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


def order_by_expert(expert_ids: Tensor, num_experts: int) -> ExpertOrder:
    """Sorts (token, slot) pairs by expert, without atomics and without a host sync.

    Args:
        expert_ids: (T, K) or (N,) int64, each in ``[0, num_experts)``.
        num_experts: E.

    Returns:
        The order, its inverse and the counts.
    """
    flat = expert_ids.reshape(-1)
    sorted_ids, order = torch.sort(flat, stable=True)
    # Every index occurs once, so this scatter writes each slot exactly once: deterministic.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.searchsorted(
        sorted_ids, torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
    )
    return ExpertOrder(order, inverse, edges[1:] - edges[:-1])
