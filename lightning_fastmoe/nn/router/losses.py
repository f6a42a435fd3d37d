"""Losses on a router's output. Both are zero for zero tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe.nn.router.base import Routing


def load_balancing_loss(routing: Routing) -> Tensor:
    """``E * sum_e f_e P_e``: 1 when the router is uniform, E when one expert gets everything.

    ``f_e`` is the share of (token, slot) pairs that chose expert e (no gradient), ``P_e`` the mean
    score of e (GShard; Switch Transformer, eq. 4-6). Computed over the tokens of this rank's
    micro-batch, as if each rank added the term to its own loss.

    Returns:
        An fp32 scalar.
    """
    tokens, num_experts = routing.scores.shape
    pairs = max(routing.expert_ids.numel(), 1)
    chosen = torch.zeros_like(routing.scores).scatter_(1, routing.expert_ids, 1.0)
    share = chosen.sum(dim=0) / pairs
    mean_score = routing.scores.sum(dim=0) / max(tokens, 1)
    return num_experts * (share * mean_score).sum()


def z_loss(routing: Routing) -> Tensor:
    """``mean_t (logsumexp_e logits[t, e])^2``, which keeps logits small (ST-MoE, eq. 5).

    Returns:
        An fp32 scalar.
    """
    tokens = max(routing.logits.shape[0], 1)
    return torch.logsumexp(routing.logits, dim=-1).square().sum() / tokens
