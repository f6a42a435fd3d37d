"""All experts of one rank as one step, with a backward that is planned as a whole.

The chain permute, grouped MLP, unpermute keeps the gathered tokens, the pre-activation H, the
activation A and the expert outputs Y for its backward. Here only x and H are kept (the idea is
SonicMoE's). For a row r of token t with routing weight w, and the layer's gradient dO:

    dA'[r] = dO[t] @ down[e]            the gradient that A would have if w were 1
    dw     = <A[r], dA'[r]>             so Y is not needed (a bias b of Y adds <b[e], dO[t]>)
    dH[r]  = w * dA'[r] * act'(H[r])
    d_down = sum_r dO[t] (w A[r])^T     so the weighted dO is not needed either
    d_up   = sum_r dH[r] x[t]^T
    dx[t]  = sum of dH[r] @ up[e] over the K rows of t

dH takes the memory of H, and w A that of dA'. A second backward through a retained graph, which
finds H spent, computes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import expert_loop, kernels, steps
from lightning_fastmoe.ops.grouped_mlp import (
    expert_sums,
    grouped_mlp,
    grouped_mm_applies,
    grouped_outer_product,
    grouped_product,
    is_aligned,
)
from lightning_fastmoe.ops.products.hopper import hopper
from lightning_fastmoe.ops.native import native
from lightning_fastmoe.ops.permute import permute, unpermute
from lightning_fastmoe.ops.routing import ExpertOrder


class _ExpertLayer(torch.autograd.Function):
    """Without ``order``, ``inverse`` and ``weights``, rows come and go in expert-major order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        order: Tensor | None,
        inverse: Tensor | None,
        tokens_per_expert: Tensor,
        offsets: Tensor,
        name: str,
        keep_h: bool,
    ) -> Tensor:
        groups = (tokens_per_expert, offsets)
        biases = (up_bias, down_bias)
        ctx.name, ctx.h_is_spent, ctx.h_has_bias = name, False, False
        x = x.contiguous()
        if (whole := _whole_layer(x, up, down, *biases)) is not None:
            library, on_hopper = whole
            out, h = library.expert_layer(
                x, weights, up, down, order, inverse, offsets, name, keep_h, on_hopper
            )
            ctx.save_for_backward(x, h, weights, up, down, *biases, order, inverse, *groups)
            return out  # type: ignore[no-any-return]
        if (library := _biased_layer(x, up, down, *biases)) is not None:
            out, h = steps.forward(
                library, x, weights, up, down, *biases, order, inverse, offsets, name, keep_h
            )
            ctx.save_for_backward(x, h, weights, up, down, *biases, order, inverse, *groups)
            ctx.h_has_bias = True
            return out
        if expert_loop.applies(x, *biases):
            out, h = expert_loop.forward(
                x, weights, up, down, order, inverse, tokens_per_expert, name, keep_h
            )
            ctx.save_for_backward(x, h, weights, up, down, *biases, order, inverse, *groups)
            return out
        h = grouped_product(_rows(x, weights, order, inverse), up.transpose(1, 2), *groups)
        a = kernels.activation(h, name, up_bias, offsets)
        ctx.save_for_backward(x, h, weights, up, down, *biases, order, inverse, *groups)
        del h  # without a graph it goes as soon as the activation exists
        y = grouped_product(a, down.transpose(1, 2), *groups)
        del a
        if inverse is not None:
            assert weights is not None
            return kernels.sum_rows(y, inverse, weights, weights.shape[1], down_bias, offsets)
        if down_bias is None:
            return y
        same_order = torch.arange(y.shape[0], device=y.device)
        return kernels.sum_rows(y, same_order, None, 1, down_bias, offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad)
        (x, h, weights, up, down, up_bias, down_bias, order, inverse, *groups) = ctx.saved_tensors
        wants = ctx.needs_input_grad
        whole = _whole_layer(x, up, down, up_bias, down_bias)
        # Other products than in the forward may apply: ZeRO 3 gathers weights anew, elsewhere.
        biased, h_has_bias = None, ctx.h_has_bias
        if whole is None and (h_has_bias or ctx.h_is_spent):
            biased = _biased_layer(x, up, down, up_bias, down_bias)
        if ctx.h_is_spent and whole is not None:
            library, on_hopper = whole  # all of the forward, for the same bits
            _, h = library.expert_layer(
                x, weights, up, down, order, inverse, groups[1], ctx.name, True, on_hopper
            )
        elif ctx.h_is_spent and biased is not None:
            h = steps.pre_activation(
                biased, x, weights, up, up_bias, order, groups[1], ctx.name
            )
            h_has_bias = True
        elif ctx.h_is_spent and expert_loop.applies(x, up_bias, down_bias):
            h = expert_loop.pre_activation(x, weights, up, order, groups[0])
        elif ctx.h_is_spent:
            h_has_bias = False
            h = grouped_product(_rows(x, weights, order, inverse), up.transpose(1, 2), *groups)
        ctx.h_is_spent = True
        none = (None,) * 6
        used = x.new_ones(h.shape[0], 1, dtype=torch.float32) if weights is None else weights
        # Through .data, as autograd would take the overwritten H of a retained graph for an error.
        d_h = h.data
        if whole is not None:
            library, on_hopper = whole
            four = library.expert_layer_backward_(
                *(grad.contiguous(), x, d_h, used, up, down, order, inverse, *groups, ctx.name),
                *(wants[0], wants[2], wants[3], on_hopper),
            )
            d_x, d_weights, d_up, d_down = (
                grad if wanted else None for grad, wanted in zip(four, wants, strict=False)
            )
            return d_x, d_weights, d_up, d_down, None, None, *none
        if biased is not None:
            found = steps.backward_(
                *(biased, grad.contiguous(), x, d_h, weights, up, down, up_bias, down_bias),
                *(order, inverse, *groups, ctx.name, wants),
            )
            return *found, *none
        if expert_loop.applies(x, up_bias, down_bias):
            four = expert_loop.backward_(
                *(grad.contiguous(), x, d_h, weights, up, down, order, inverse, groups[0]),
                *(ctx.name, wants[:4]),
            )
            return *four, None, None, *none

        d_x = d_up = d_down = d_up_bias = d_down_bias = None
        d_out = _rows(grad, weights, order, inverse)
        d_act = grouped_product(d_out, down, *groups)
        if wants[5]:
            row_weights = None if weights is None else weights.reshape(-1).index_select(0, order)
            d_down_bias = expert_sums(d_out, *groups, weights=row_weights)
        weighted_act = d_act
        d_weights = kernels.activation_backward_(
            *(d_h, weighted_act, used, order, ctx.name),
            *(None if h_has_bias else up_bias, groups[1]),
        )
        if wants[1] and down_bias is not None:
            d_weights += steps.bias_dots(grad, down_bias, inverse, groups[1], d_weights)
        if wants[3]:
            d_down = grouped_outer_product(d_out, weighted_act, *groups)
        del d_out, d_act, weighted_act
        if wants[4]:
            d_up_bias = expert_sums(d_h, *groups)
        if wants[0]:
            d_x = grouped_product(d_h, up, *groups)
            if inverse is not None:
                d_x = kernels.sum_rows(d_x, inverse, None, weights.shape[1])
        if wants[2]:
            d_up = grouped_outer_product(d_h, _rows(x, weights, order, inverse), *groups)
        return d_x, d_weights if wants[1] else None, d_up, d_down, d_up_bias, d_down_bias, *none


def _whole_layer(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None
) -> tuple[Any, bool] | None:
    """The kernels and whether to take Hopper's products, if they can be the layer as two operators.

    They can without biases, where each product is one kernel. Without Hopper's own products, they
    take the same steps as below and give the same bits.
    """
    if up_bias is not None or down_bias is not None or not x.is_cuda or not x.shape[0]:
        return None
    if (library := hopper(x, up, down)) is not None:
        return library, True
    if not all(grouped_mm_applies(x, w) and is_aligned(w) for w in (up, down)):
        return None
    library = native(x, up, down)
    return None if library is None else (library, False)


def _biased_layer(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None
) -> Any | None:
    """Hopper's products, if they take the layer with its biases; see ``steps``."""
    biases = [bias for bias in (up_bias, down_bias) if bias is not None]
    return hopper(x, up, down, *biases) if x.shape[0] else None


def _needs_graph(*inputs: Tensor | None) -> bool:
    """Whether a backward may follow, so that the pre-activation has to be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _rows(
    x: Tensor, weights: Tensor | None, order: Tensor | None, inverse: Tensor | None
) -> Tensor:
    """The tokens in expert-major order, (N, D)."""
    if order is None or inverse is None:
        return x.contiguous()  # a gradient may be expanded
    assert weights is not None
    return kernels.permute_rows(x, order, inverse, weights.shape[1])


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward for create_graph=True: that of the chain, whose parts can be differentiated."""
    (x, _, weights, up, down, up_bias, down_bias, order, inverse, counts, _) = ctx.saved_tensors
    biases = (up_bias, down_bias)
    if order is None:
        out = grouped_mlp(x, counts, up, down, ctx.name, *biases)
    else:
        out = _chain(x, weights, order, inverse, counts, up, down, ctx.name, *biases)
    inputs = (x, weights, up, down, *biases)
    wants = ctx.needs_input_grad[: len(inputs)]
    wanted = [t for t, needed in zip(inputs, wants, strict=True) if needed]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return *(next(found) if needed else None for needed in wants), *(None,) * 6


def _chain(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    tokens_per_expert: Tensor,
    *mlp: Any,
) -> Tensor:
    rows = permute(x, order, inverse, weights.shape[1])
    return unpermute(grouped_mlp(rows, tokens_per_expert, *mlp), weights, order, inverse)


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

    Keeps x and the pre-activation for the backward, and nothing else of T*K rows.

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


def expert_mlp(
    x: Tensor,
    tokens_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Each expert on its own rows: :func:`expert_layer` for rows that came in expert-major order.

    What :func:`~lightning_fastmoe.ops.grouped_mlp.grouped_mlp` computes, but it keeps x and the
    pre-activation alone.

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
