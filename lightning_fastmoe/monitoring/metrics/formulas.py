"""Formulas for load ratios, variation, dead experts and drop rate, from token counts."""

from __future__ import annotations

import torch
from torch import Tensor


def load_ratio(tokens_per_expert: Tensor) -> Tensor:
    """``E * n[e] / sum(n)``: an expert's load over the mean load; zeros if there are no tokens.

    1 is balanced, 0 is dead, E is all tokens on one expert.

    Args:
        tokens_per_expert: n, (..., E), any numeric dtype.

    Returns:
        (..., E) fp64.
    """
    mean = tokens_per_expert.double().mean(dim=-1, keepdim=True)
    return tokens_per_expert / mean.clamp_min(torch.finfo(torch.float64).tiny)


def load_cv(tokens_per_expert: Tensor) -> Tensor:
    """Coefficient of variation of the loads: their standard deviation over their mean, fp64.

    ``sqrt(mean over e of (load_ratio[e] - 1)^2)``: 0 is balanced, ``sqrt(E - 1)`` is all tokens on
    one expert. Shazeer et al. 2017 balance with its square.
    """
    return load_ratio(tokens_per_expert).std(dim=-1, correction=0)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """The number of experts that no token chose, int64."""
    return (tokens_per_expert == 0).sum(dim=-1)


def drop_rate(routed: Tensor, kept: Tensor) -> Tensor:
    """``1 - sum(kept) / sum(routed)``: the fraction of dropped pairs, fp64; 0 without pairs."""
    total = routed.sum(dim=-1).double()
    return 1.0 - torch.where(total > 0, kept.sum(dim=-1) / total.clamp_min(1.0), 1.0)
