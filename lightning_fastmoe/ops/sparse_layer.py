"""A layer of which single experts are trained: their weights replace rows of frozen stacks.

The stacks hold every expert, so that forward passes and the gradients of tokens are those of
:mod:`~lightning_fastmoe.ops.expert_layer`. Trained experts are smaller stacks of their own, which
are all that gradients and optimizers see. Gradients of weights are computed for them alone: half of
a layer's backward pass is such GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fastmoe.ops import choice
from lightning_fastmoe.ops.activation import ACTIVATIONS
from lightning_fastmoe.ops.double_backward import differentiable_gradients
from lightning_fastmoe.ops.expert_layer import expert_layer, expert_mlp, unfused_layer
from lightning_fastmoe.ops.grouped_linear import PartlyTrained, put_in_place
from lightning_fastmoe.ops.grouped_mlp import grouped_mlp
from lightning_fastmoe.ops.kernels import accumulation_dtype
from lightning_fastmoe.ops.layer_call import LayerCall, PreActivation, Wanted
from lightning_fastmoe.ops.routing import ExpertOrder

Stacks = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Up, down and their biases, each (experts, ...)."""


class TrainedRows(NamedTuple):
    """The trained experts of a layer.

    Attributes:
        rows: where they are in the stacks, ascending; may be empty.
        stacks: their weights and biases, each (rows, ...), in the dtype of the frozen ones.
    """

    rows: tuple[int, ...]
    stacks: Stacks


def with_rows(stacks: Stacks, trained: TrainedRows) -> Stacks:
    """Copies of the stacks with the trained rows, differentiable in these."""

    def one(stack: Tensor | None, own: Tensor | None) -> Tensor | None:
        if stack is None or own is None:
            return None
        return PartlyTrained(stack, own, trained.rows).whole()

    up, down, *biases = (one(*pair) for pair in zip(stacks, trained.stacks, strict=True))
    assert up is not None
    assert down is not None
    return up, down, biases[0], biases[1]


class _SparseLayer(torch.autograd.Function):
    """Inputs that may have gradients, in the order of :class:`Wanted`; then the frozen stacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, *rest: Any) -> Tensor:
        own, stacks = rest[:4], rest[4:8]
        activation, rows, keep_h = rest[12:]
        put_in_place(stacks, rows, own)
        fields: list[Any] = [*stacks, *rest[8:12], activation]
        call = LayerCall(x.contiguous(), weights, *fields)
        out, h = choice.choose(call).forward(call, keep_h)
        ctx.save_for_backward(h.rows, call.x, weights, *rest[:12])
        ctx.activation, ctx.rows = activation, rows
        ctx.h_has_bias, ctx.h_is_spent = h.has_bias, False
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_rows, x, weights, *rest = ctx.saved_tensors
        own, stacks = tuple(rest[:4]), tuple(rest[4:8])
        trained = TrainedRows(ctx.rows, own)
        wanted = Wanted(*ctx.needs_input_grad[:6])._replace(experts=ctx.rows)
        put_in_place(stacks, ctx.rows, own)  # ZeRO 3 has gathered the stacks again
        fields: list[Any] = [*stacks, *rest[8:], ctx.activation]
        call = LayerCall(x, weights, *fields)
        if torch.is_grad_enabled():
            found = _differentiable_backward(call, trained, grads[0], wanted)
        else:
            # Through .data, as in expert_layer: the backward overwrites H.
            h = None if ctx.h_is_spent else PreActivation(h_rows.data, ctx.h_has_bias)
            implementation = choice.choose(call, h, stepwise=True)
            if h is None:
                h = implementation.pre_activation(call)
            ctx.h_is_spent = True
            found = implementation.backward_(call, grads[0], h, wanted)
        return *found, *(None,) * 11


def _differentiable_backward(
    call: LayerCall, trained: TrainedRows, grad: Tensor, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """The backward for create_graph=True, through the differentiable, unfused operations."""
    order = None
    if call.order is not None and call.inverse is not None:
        order = ExpertOrder(call.order, call.inverse, call.tokens_per_expert, call.offsets)
    stacks = (call.up, call.down, call.up_bias, call.down_bias)

    def compute(x: Tensor, weights: Tensor | None, *own: Any) -> Tensor:
        rows = TrainedRows(trained.rows, own)
        return _unfused(x, call.tokens_per_expert, weights, order, stacks, rows, call.activation)

    inputs = (call.x, call.weights, *trained.stacks)
    return differentiable_gradients(compute, inputs, grad, wanted[:6])


def _unfused(
    x: Tensor,
    tokens_per_expert: Tensor,
    weights: Tensor | None,
    order: ExpertOrder | None,
    stacks: Stacks,
    trained: TrainedRows,
    activation: str | Callable[[Tensor], Tensor],
) -> Tensor:
    """The layer around a function of its own: weights stay where they are, biases are copied."""
    up, down = (
        PartlyTrained(stack, own, trained.rows)
        for stack, own in zip(stacks[:2], trained.stacks[:2], strict=True)
    )
    biases = [
        stack if stack is None or own is None else PartlyTrained(stack, own, trained.rows).whole()
        for stack, own in zip(stacks[2:], trained.stacks[2:], strict=True)
    ]
    mlp: Any = (up, down, activation, *biases)
    if weights is None or order is None:
        return grouped_mlp(x, tokens_per_expert, *mlp)
    return unfused_layer(x, weights, order, *mlp)


def sparse_layer(
    x: Tensor,
    tokens_per_expert: Tensor,
    weights: Tensor | None,
    order: ExpertOrder | None,
    stacks: Stacks,
    trained: TrainedRows,
    activation: str | Callable[[Tensor], Tensor],
) -> Tensor:
    """:func:`~lightning_fastmoe.ops.expert_layer` or ``expert_mlp``, training some experts.

    The trained experts' rows of ``stacks`` are overwritten, and gradients of weights computed for
    those experts alone. ``torch.compile`` copies the stacks, and computes the gradients of all
    experts.

    Args:
        x: (T, D); without ``order`` (N, D), rows grouped by expert.
        tokens_per_expert: (E,) int64.
        weights: (T, K), with ``order``.
        order: the pairs by expert, or None.
        stacks: frozen weights and biases of all experts, each (E, ...) in the dtype of ``x``.
        trained: the trained experts.
        activation: a name, or a function as in
            :func:`~lightning_fastmoe.ops.grouped_mlp.grouped_mlp`.

    Returns:
        Like ``x``.
    """
    if not (isinstance(activation, str) and activation in ACTIVATIONS):
        return _unfused(x, tokens_per_expert, weights, order, stacks, trained, activation)
    if torch.compiler.is_dynamo_compiling():
        up, down, *biases = with_rows(stacks, trained)
        if weights is None or order is None:
            return expert_mlp(x, tokens_per_expert, up, down, activation, *biases)
        return expert_layer(x, weights, order, up, down, activation, *biases)
    pairs: tuple[Tensor | None, ...]
    if weights is None or order is None:
        weights, offsets = None, torch.cumsum(tokens_per_expert, 0).to(torch.int32)
        pairs = (None, None, tokens_per_expert, offsets)
    else:
        weights = weights.to(accumulation_dtype(x.dtype))
        pairs = (order.order, order.inverse, order.tokens_per_expert, order.offsets)
    inputs = (x, weights, *trained.stacks)
    keep_h = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out: Tensor = _SparseLayer.apply(*inputs, *stacks, *pairs, activation, trained.rows, keep_h)
    return out
