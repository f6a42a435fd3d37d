"""All experts of one rank as a single autograd node with a fused backward.

:mod:`~lightning_fastmoe.ops.steps` has the formulas; :mod:`~lightning_fastmoe.ops.choice` chooses
the implementation. Only the inputs and the pre-activation H are saved. The backward overwrites H
with dH; a second backward through a retained graph recomputes H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import choice, kernels, traced_layer
from lightning_fastmoe.ops.double_backward import differentiable_gradients
from lightning_fastmoe.ops.grouped_mlp import LowRank, StackedWeight, grouped_mlp
from lightning_fastmoe.ops.layer_call import LayerCall, Wanted, restore, save
from lightning_fastmoe.ops.pair_rows import PairRows, pair_rows, weights_later
from lightning_fastmoe.ops.pairs import combine_rows, gather_rows, order_pairs
from lightning_fastmoe.ops.permute import permute, unpermute
from lightning_fastmoe.ops.routing import ExpertOrder


class _ExpertLayer(torch.autograd.Function):
    """The arguments are the fields of a :class:`LayerCall`, then whether to keep H."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *fields, keep_h = rest
        call = LayerCall(x.contiguous(), *fields)
        out, h = choice.choose(call).forward(call, keep_h)
        save(ctx, call, h)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, h = restore(ctx)
        wanted = Wanted(*ctx.needs_input_grad[:6])
        if torch.is_grad_enabled():
            found = _differentiable_backward(call, grads[0], wanted)
        else:
            implementation = choice.choose(call, h)
            if h is None:
                h = implementation.pre_activation(call)
            ctx.h_is_spent = True
            found = implementation.backward_(call, grads[0], h, wanted)
        return *found, *(None,) * 6


def _needs_graph(*inputs: Tensor | None) -> bool:
    """Whether a backward may follow, so that the pre-activation has to be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _differentiable_backward(
    call: LayerCall, grad: Tensor, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """The backward for create_graph=True, through the differentiable, unfused operations."""

    def compute(x: Tensor, weights: Tensor | None, *mlp: Any) -> Tensor:
        up, down, *biases = mlp
        if call.order is None or call.inverse is None:
            return grouped_mlp(x, call.tokens_per_expert, up, down, call.activation, *biases)
        assert weights is not None
        order = ExpertOrder(call.order, call.inverse, call.tokens_per_expert, call.offsets)
        return unfused_layer(x, weights, order, up, down, call.activation, *biases)

    inputs = (call.x, call.weights, call.up, call.down, call.up_bias, call.down_bias)
    return differentiable_gradients(compute, inputs, grad, wanted[:6])


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

    Saves x and the pre-activation for the backward, and nothing else with T*K rows.

    Args:
        x: (T, D).
        weights: (T, K).
        order: the (token, slot) pairs by expert; pairs without a row add nothing.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D); dtype of ``x``.
        down: (E, D, F).
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
        up_bias: (E, 2F) or (E, F).
        down_bias: (E, D).

    Returns:
        (T, D) in the dtype of ``x``; for :class:`~lightning_fastmoe.ops.pair_rows.PairRows` as
        that says.
    """
    if isinstance(order, PairRows):
        wide = weights.to(kernels.accumulation_dtype(x.dtype))
        return pair_rows(x, wide, order, up, down, activation, up_bias, down_bias)
    if torch.compiler.is_dynamo_compiling():
        return traced_layer.expert_layer(  # type: ignore[no-any-return]
            *(x, weights.to(kernels.accumulation_dtype(x.dtype)), up, down, up_bias, down_bias),
            *(order.order, order.inverse, order.tokens_per_expert, order.offsets, activation),
            _needs_graph(x, weights, up, down, up_bias, down_bias),
        )[0]
    out: Tensor = _ExpertLayer.apply(
        x,
        weights.to(kernels.accumulation_dtype(x.dtype)),
        up,
        down,
        up_bias,
        down_bias,
        order.order,
        order.inverse,
        order.tokens_per_expert,
        order.offsets,
        activation,
        _needs_graph(x, weights, up, down, up_bias, down_bias),
    )
    return out


def unfused_layer(
    x: Tensor,
    weights: Tensor,
    order: ExpertOrder,
    up: StackedWeight,
    down: StackedWeight,
    activation: str | Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_adapter: LowRank | None = None,
    down_adapter: LowRank | None = None,
) -> Tensor:
    """:func:`expert_layer` by separate operations, for any activation and for double backward.

    ``activation`` may also be a function, weights may be made when needed, and there may be
    adapters, as in :func:`~lightning_fastmoe.ops.grouped_mlp.grouped_mlp`.
    """
    mlp = (
        *(order.tokens_per_expert, up, down, activation, up_bias, down_bias),
        *(up_adapter, down_adapter),
    )
    if isinstance(order, PairRows):
        return weights_later(grouped_mlp(x, *mlp), weights, order)
    if order.has_all_pairs:
        rows = permute(x, order.order, order.inverse, weights.shape[1])
        return unpermute(grouped_mlp(rows, *mlp), weights, order.order, order.inverse)
    token = torch.div(order.order, weights.shape[1], rounding_mode="floor")
    pairs = order_pairs(token, x.shape[0])
    by_row = torch.gather(weights.reshape(-1), 0, order.order)
    return combine_rows(grouped_mlp(gather_rows(x, pairs), *mlp), by_row, pairs)


def expert_mlp(
    x: Tensor,
    tokens_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Each expert on its own rows: :func:`expert_layer` for rows already in expert-major order.

    Computes the same as :func:`~lightning_fastmoe.ops.grouped_mlp.grouped_mlp`, but saves only x
    and the pre-activation.

    Args:
        x: (N, D), rows grouped by expert.
        tokens_per_expert: (E,) int64 with sum N.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D); dtype of ``x``.
        down: (E, D, F).
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
        up_bias: (E, 2F) or (E, F).
        down_bias: (E, D).

    Returns:
        (N, D) in the dtype of ``x``.
    """
    offsets = torch.cumsum(tokens_per_expert, 0).to(torch.int32)
    out: Tensor = _ExpertLayer.apply(
        x,
        None,
        up,
        down,
        up_bias,
        down_bias,
        None,
        None,
        tokens_per_expert,
        offsets,
        activation,
        _needs_graph(x, up, down, up_bias, down_bias),
    )
    return out
