"""The layer of :mod:`~lightning_fastmoe.ops.expert_layer` as operators for ``torch.compile``.

A compiler puts them into its graphs as they are. Forward and backward are functional, since AOT
Autograd refuses a backward that writes to what the forward saved: H is an output of the forward,
and the backward leaves it intact. H's gradient therefore has memory of its own: that of one expert
at a time on the CPU, of this layer on CUDA, freed when the layer's backward ends. Without
``torch.compile`` it overwrites H.

Nothing that the operators take or return is on the CPU if the tokens are on a GPU: CUDA graphs
would be cut there, and inductor fails to cut one between an operator and its outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import choice, kernels
from lightning_fastmoe.ops.layer_call import LayerCall, PreActivation, Wanted
from lightning_fastmoe.ops.native import TRACED_NAMESPACE
from lightning_fastmoe.ops.operator import differentiate, fake_of, operator


@operator(f"{TRACED_NAMESPACE}::expert_layer")
def expert_layer(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    activation: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """The forward; the arguments are those of a :class:`LayerCall`, then whether to keep H.

    Returns:
        The output (T, D), and H with its bias (N, 2F) or (N, F), without rows unless ``keep_h``.
    """
    call = LayerCall(
        *(x.contiguous(), weights, up, down, up_bias, down_bias),
        *(order, inverse, tokens_per_expert, offsets, activation),
    )
    out, h = choice.choose(call).forward(call, keep_h)
    if not h.has_bias and call.up_bias is not None:
        kernels.add_bias_(h.rows, call.up_bias, offsets)
    return out, h.rows


@operator(f"{TRACED_NAMESPACE}::expert_layer_backward")
def expert_layer_backward(
    grad: Tensor,
    h: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    activation: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients of the first six arguments of :func:`expert_layer`, of those ``wanted``."""
    call = LayerCall(
        *(x.contiguous(), weights, up, down, up_bias, down_bias),
        *(order, inverse, tokens_per_expert, offsets, activation),
    )
    kept = PreActivation(h, True)
    found = choice.choose(call, kept).backward(call, grad, kept, Wanted._make([*wanted, None]))
    return [_like(g, t) for g, t in _pairs(found, (x, weights, up, down, up_bias, down_bias))]


def _pairs(found: Any, inputs: tuple[Tensor | None, ...]) -> list[tuple[Tensor, Tensor]]:
    """The gradients that were computed, each with its input."""
    pairs = zip(found, inputs, strict=True)
    return [(g, t) for g, t in pairs if g is not None and t is not None]


def _like(gradient: Tensor, of: Tensor) -> Tensor:
    """The gradient as :func:`_empty_like` promised it."""
    return gradient.to(of.dtype).contiguous()


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


@fake_of(expert_layer)
def _(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = weights.shape[0] * weights.shape[1] if rest[-1] else 0
    return _empty_like(x), x.new_empty(rows, up.shape[1])


@fake_of(expert_layer_backward)
def _(grad: Tensor, h: Tensor, *rest: Any) -> list[Tensor]:
    wanted = rest[-1]
    return [_empty_like(t) for t, needed in zip(rest[:6], wanted, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, _ = inputs
    _, h = output
    ctx.save_for_backward(h, *tensors)
    ctx.activation = activation
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    h, *tensors = ctx.saved_tensors
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:6]]
    found = iter(expert_layer_backward(grad, h, *tensors, ctx.activation, wanted))
    return *(next(found) if needed else None for needed in wanted), *(None,) * 6


differentiate(expert_layer, _backward, setup_context=_save)
