"""All experts of one rank by unfused operations: grouped GEMM, activation, grouped GEMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fastmoe.ops.activation import apply_activation
from lightning_fastmoe.ops.frozen_weight import FrozenWeight
from lightning_fastmoe.ops.grouped_linear import (
    PartlyTrained,
    grouped_linear,
    partly_trained_linear,
)

StackedWeight = Tensor | PartlyTrained | FrozenWeight
"""A stack of experts' weights: trained or frozen as a whole, trained in part, or made when used."""


class _RowBias(torch.autograd.Function):
    """Each row's bias; the gradient is a GEMM with a 0/1 matrix, which needs no scatter."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(expert)
        ctx.num_experts = bias.shape[0]
        return bias.index_select(0, expert)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (expert,) = ctx.saved_tensors
        experts = torch.arange(ctx.num_experts, device=expert.device)
        return (experts.unsqueeze(1) == expert).to(grads[0].dtype) @ grads[0], None


def _row_bias(bias: Tensor, tokens_per_expert: Tensor, rows: int) -> Tensor:
    """(E, M) -> (N, M): the bias of the expert that each row belongs to."""
    ends = torch.cumsum(tokens_per_expert, 0)
    expert = torch.searchsorted(ends, torch.arange(rows, device=bias.device), right=True)
    return _RowBias.apply(bias, expert)  # type: ignore[no-any-return]


class LowRank(NamedTuple):
    """What is added to each expert's weight: ``scale * b[e] @ a[e]``, which is never formed (LoRA).

    Attributes:
        a: (E, r, inputs).
        b: (E, outputs, r).
        scale: multiplies the product.
    """

    a: Tensor
    b: Tensor
    scale: float


def _adapted(
    x: Tensor, weight: StackedWeight, adapter: LowRank | None, tokens_per_expert: Tensor
) -> Tensor:
    """:func:`grouped_linear` with ``weight`` and what the adapter adds to it."""
    if isinstance(weight, PartlyTrained):
        out = partly_trained_linear(x, weight, tokens_per_expert)
    else:
        out = grouped_linear(x, weight, tokens_per_expert)
    if adapter is None:
        return out
    inner = grouped_linear(x, adapter.a, tokens_per_expert)
    return out + adapter.scale * grouped_linear(inner, adapter.b, tokens_per_expert)


def grouped_mlp(
    x: Tensor,
    tokens_per_expert: Tensor,
    up: StackedWeight,
    down: StackedWeight,
    activation: str | Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_adapter: LowRank | None = None,
    down_adapter: LowRank | None = None,
) -> Tensor:
    """The FFN of every expert on its own rows.

    Args:
        x: (N, D), rows grouped by expert.
        tokens_per_expert: (E,) int64 with sum N.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D); where single experts
            are trained, with their slices apart.
        down: (E, D, F).
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`, or a
            differentiable function of the pre-activation, (N, rows of ``up``) -> (N, F).
        up_bias: (E, 2F) or (E, F).
        down_bias: (E, D).
        up_adapter: added to ``up``.
        down_adapter: added to ``down``.

    Returns:
        (N, D) in the dtype of ``x``.
    """
    h = _adapted(x, up, up_adapter, tokens_per_expert)
    if up_bias is not None:
        h = h + _row_bias(up_bias, tokens_per_expert, x.shape[0])
    a = apply_activation(h, activation) if isinstance(activation, str) else activation(h)
    y = _adapted(a, down, down_adapter, tokens_per_expert)
    if down_bias is not None:
        y = y + _row_bias(down_bias, tokens_per_expert, x.shape[0])
    return y
