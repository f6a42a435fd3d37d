"""Experts on rows that are one (token, slot) pair each, whose weighted sums are made elsewhere.

A layer multiplies a row by its weight after the last product of the forward pass, and within the
backward pass, after the first. Rows whose tokens are on another rank take part in the same
arithmetic only if that rank sums them: the functions here leave out the weights and the sum of the
forward pass, and take the gradient of the sum. N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe.ops import choice, kernels
from lightning_fastmoe.ops.layer_call import LayerCall, Wanted, restore, save
from lightning_fastmoe.ops.routing import ExpertOrder


@dataclass(frozen=True)
class PairRows(ExpertOrder):
    """Rows by expert that are a pair each, as tokens with one slot whose order is that of the rows.

    With it, experts return ``y[r] = expert(x[r])``, without the weight; what they take as its
    gradient is that of the sum of ``weight[r] * y[r]`` which somebody else makes.
    """

    @classmethod
    def of(cls, pairs: ExpertOrder) -> PairRows:
        """For the rows of other tokens' pairs, in the order of their experts."""
        rows = torch.arange(pairs.order.shape[0], device=pairs.order.device)
        return cls(rows, rows, pairs.tokens_per_expert, pairs.offsets)


class _PairRows(torch.autograd.Function):
    """The arguments are the fields of a :class:`LayerCall`, then whether to keep H."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *fields, keep_h = rest
        call = LayerCall(x.contiguous(), *fields)
        # By expert without an order and weights: the same products, without what follows them.
        by_expert = replace(call, weights=None, order=None, inverse=None, down_bias=None)
        y, h = choice.choose(call).forward(by_expert, keep_h)
        if call.down_bias is not None:
            wide = y.to(kernels.accumulation_dtype(y.dtype))
            y = wide + kernels.bias_rows(call.down_bias, call.offsets, len(y)).to(wide.dtype)
        save(ctx, call, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, h = restore(ctx)
        implementation = choice.choose(call, h)
        if h is None:
            h = implementation.pre_activation(call)
        ctx.h_is_spent = True
        wanted = Wanted(*ctx.needs_input_grad[:6])
        grad = grads[0].to(call.x.dtype).contiguous()
        return *implementation.backward_(call, grad, h, wanted), *(None,) * 6


def pair_rows(
    x: Tensor,
    weights: Tensor,
    order: PairRows,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """What :func:`~lightning_fastmoe.ops.expert_layer` sums, with the same bits; see the order.

    The gradients are those of the layer: ``x`` gets the rows that the layer sums over slots.

    Args:
        x: (N, D).
        weights: (N, 1), in the accumulation dtype.
        order: of the rows.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D); dtype of ``x``.
        down: (E, D, F).
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
        up_bias: (E, 2F) or (E, F).
        down_bias: (E, D).

    Returns:
        (N, D) in the dtype of ``x``; with ``down_bias``, which the layer adds in the accumulation
        dtype, in that.
    """
    inputs = (x, weights, up, down, up_bias, down_bias)
    keep_h = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y: Tensor = _PairRows.apply(
        *inputs,
        *(order.order, order.inverse, order.tokens_per_expert, order.offsets, activation, keep_h),
    )
    return y


class _WeightsLater(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, inverse)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, order, inverse = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        dy, dw = kernels.unpermute_backward(grads[0], y, weights, order, inverse, wanted)
        return dy, dw, None, None


def weights_later(y: Tensor, weights: Tensor, order: PairRows) -> Tensor:
    """``y``, with the gradients of :func:`~lightning_fastmoe.ops.unpermute`; see the order.

    Args:
        y: (N, D), what experts made by separate operations.
        weights: (N, 1).
        order: of the rows.
    """
    later: Tensor = _WeightsLater.apply(y, weights, order.order, order.inverse)
    return later
