"""A router with its losses in plain PyTorch, for peers whose experts are given their routing.

It computes what :class:`lightning_fastmoe.MoE` computes besides its experts, so that whole layers
can be compared: with the same router in front, they differ in what is behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layer.problem import LOAD_BALANCING, Z_LOSS


@dataclass(frozen=True)
class Routing:
    """What a router found.

    Attributes:
        logits: (T, E) fp32.
        scores: (T, E) fp32, their softmax.
        weights: (T, K) fp32, normalised over K for K > 1.
        expert_ids: (T, K).
    """

    logits: Tensor
    scores: Tensor
    weights: Tensor
    expert_ids: Tensor


def score(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and scores. The product is one in fp32, since a worker turns TF32 off."""
    logits = F.linear(x.float(), router)
    return logits, torch.softmax(logits, dim=-1)


def route(x: Tensor, router: Tensor, top_k: int) -> Routing:
    """Chooses by softmax and top-k.

    Args:
        x: (T, D).
        router: (E, D) fp32.
        top_k: K.
    """
    logits, scores = score(x, router)
    weights, expert_ids = scores.topk(top_k, dim=-1)
    if top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits, scores, weights, expert_ids)


def add_losses(out: Tensor, routing: Routing, tokens_per_expert: Tensor) -> Tensor:
    """Returns ``out``; its backward pass is also that of the load-balancing loss and the z-loss.

    Args:
        out: (T, D), the layer's output.
        routing: the routing that led to it.
        tokens_per_expert: (E,), which a layer knows anyway.
    """
    num_experts = routing.logits.shape[1]
    shares = tokens_per_expert / routing.expert_ids.numel()
    balance = num_experts * (shares * routing.scores.mean(dim=0)).sum()
    z = torch.logsumexp(routing.logits, dim=-1).square().mean()
    added: Tensor = _AddLoss.apply(out, LOAD_BALANCING * balance + Z_LOSS * z)
    return added


class _AddLoss(torch.autograd.Function):
    """Gives the loss the gradient 1, as a training loop that adds it to its own does.

    Here a backward pass starts from the gradient of the layer's output, and there is no other loss.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)
