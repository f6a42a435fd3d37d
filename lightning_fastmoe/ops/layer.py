"""All experts of one rank on tokens in their own order, with a backward that is planned as a whole.

The chain permute, grouped MLP, unpermute keeps the gathered tokens, the pre-activation H, the
activation A and the expert outputs Y for its backward. Here only x and H are kept (the idea is
SonicMoE's). For a row r of token t with routing weight w, and the layer's gradient dO:

    dA'[r] = dO[t] @ down[e]            the gradient that A would have if w were 1
    dw     = <A[r], dA'[r]>             so Y is not needed
    dH[r]  = w * dA'[r] * act'(H[r])
    d_down = sum_r dO[t] (w A[r])^T     so the weighted dO is not needed either
    d_up   = sum_r dH[r] x[t]^T
    dx[t]  = sum of dH[r] @ up[e] over the K rows of t
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.grouped_mlp import grouped_mlp, grouped_outer_product, grouped_product
from lightning_fastmoe.ops.permute import permute, unpermute
from lightning_fastmoe.ops.routing import ExpertOrder


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        order: Tensor,
        inverse: Tensor,
        tokens_per_expert: Tensor,
        offsets: Tensor,
        name: str,
    ) -> Tensor:
        top_k = weights.shape[1]
        groups = (tokens_per_expert, offsets)
        rows = kernels.permute_rows(x, order, inverse, top_k)
        h = grouped_product(rows, up.transpose(1, 2), *groups)
        del rows  # each buffer goes as soon as the next exists
        a = kernels.activation(h, name)
        ctx.save_for_backward(x, h, weights, up, down, order, inverse, *groups)
        ctx.name = name
        del h
        y = grouped_product(a, down.transpose(1, 2), *groups)
        del a
        return kernels.sum_rows(y, inverse, weights, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad)
        x, h, weights, up, down, order, inverse, *groups = ctx.saved_tensors
        wants_x, wants_weights, wants_up, wants_down = ctx.needs_input_grad[:4]
        top_k = weights.shape[1]
        d_x = d_up = d_down = None
        d_out = kernels.permute_rows(grad, order, inverse, top_k)
        d_act = grouped_product(d_out, down, *groups)
        # H itself stays: a second backward through a retained graph reads it again.
        d_h, d_weights = kernels.activation_backward_(h, d_act, weights, order, ctx.name)
        weighted_act = d_act
        if wants_down:
            d_down = grouped_outer_product(d_out, weighted_act, *groups)
        del d_out, d_act, weighted_act, h
        if wants_up:
            rows = kernels.permute_rows(x, order, inverse, top_k)
            d_up = grouped_outer_product(d_h, rows, *groups)
            del rows
        if wants_x:
            d_rows = grouped_product(d_h, up, *groups)
            del d_h
            d_x = kernels.sum_rows(d_rows, inverse, None, top_k)
        none = (None,) * 5
        return d_x, d_weights if wants_weights else None, d_up, d_down, *none


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward for create_graph=True: that of the chain, whose parts can be differentiated."""
    x, _, weights, up, down, order, inverse, *_, tokens_per_expert, _ = ctx.saved_tensors
    rows = permute(x, order, inverse, weights.shape[1])
    y = grouped_mlp(rows, tokens_per_expert, up, down, ctx.name)
    out = unpermute(y, weights, order, inverse)
    inputs = (x, weights, up, down)
    wanted = [t for t, wants in zip(inputs, ctx.needs_input_grad, strict=False) if wants]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    none = (None,) * 5
    return *(next(found) if wants else None for wants in ctx.needs_input_grad[:4]), *none


def expert_layer(
    x: Tensor,
    weights: Tensor,
    order: ExpertOrder,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """``y[t] = sum_k weights[t, k] * expert[k-th of t](x[t])``, with all experts on this rank.

    Without biases it keeps x and the pre-activation for the backward, and nothing else of T*K rows.
    With biases it is the chain of :func:`permute`,
    :func:`grouped_mlp` and :func:`unpermute`.

    Args:
        x: (T, D).
        weights: (T, K).
        order: the (token, slot) pairs by expert.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D); dtype of ``x``.
        down: (E, D, F).
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
        up_bias: (E, 2F) or (E, F).
        down_bias: (E, D).

    Returns:
        (T, D) in the dtype of ``x``.
    """
    if up_bias is not None or down_bias is not None:
        rows = permute(x, order.order, order.inverse, weights.shape[1])
        counts = order.tokens_per_expert
        y = grouped_mlp(rows, counts, up, down, activation, up_bias, down_bias)
        return unpermute(y, weights, order.order, order.inverse)
    out: Tensor = _ExpertLayer.apply(
        x,
        weights.to(kernels.accumulation_dtype(x.dtype)),
        up,
        down,
        order.order,
        order.inverse,
        order.tokens_per_expert,
        order.offsets,
        activation,
    )
    return out
