"""The layer with biases from the grouped GEMMs of compute capability 9.0, one after the other.

Formulas and names are those of :mod:`~lightning_fastmoe.ops.expert_layer`. H holds the bias here, as the
product adds it to its registers. Sums of rows per expert are products as well: with a few columns
beside the rows, of which the first holds the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.grouped_mlp import expert_sums, weight_columns
from lightning_fastmoe.ops.products.hopper import (
    backward_activation_,
    rows_product,
    up_forward,
    weight_gradient,
)


def forward(
    library: Any,
    x: Tensor,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    order: Tensor | None,
    inverse: Tensor | None,
    offsets: Tensor,
    name: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """The output (T, D), or (N, D) without ``order``, and H with its bias, (N, 2F) or (N, F)."""
    pairs = _pairs(x, order)
    top_k = 1 if weights is None else weights.shape[1]
    h, a = up_forward(library, x, pairs, top_k, offsets, up, name, up_bias, keep_h)
    y = rows_product(library, a, offsets, down, True)
    del a
    if inverse is None and down_bias is None:
        return y, h
    places = pairs if inverse is None else inverse
    return kernels.sum_rows(y, places, weights, top_k, down_bias, offsets), h


def pre_activation(
    library: Any,
    x: Tensor,
    weights: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    name: str,
) -> Tensor:
    """H of :func:`forward` again, the same bits."""
    top_k = 1 if weights is None else weights.shape[1]
    return up_forward(library, x, _pairs(x, order), top_k, offsets, up, name, up_bias)[0]


def backward_(
    library: Any,
    grad: Tensor,
    x: Tensor,
    h: Tensor,
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
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, up, down and both biases, where wanted. H is overwritten."""
    pairs = _pairs(x, order)
    used = (
        x.new_ones(h.shape[0], 1, dtype=kernels.accumulation_dtype(x.dtype))
        if weights is None
        else weights
    )
    top_k = used.shape[1]
    weighted_act, d_weights = backward_activation_(
        library, grad, pairs, offsets, down, h, used, name
    )
    d_x = d_up = d_down = d_up_bias = d_down_bias = None
    if wants[1] and down_bias is not None:
        assert inverse is not None
        d_weights += bias_dots(grad, down_bias, inverse, offsets, d_weights)
    if wants[5]:
        columns = weight_columns(used.reshape(-1).index_select(0, pairs), grad)
        sums = weight_gradient(library, grad, pairs, top_k, columns, offsets, False)
        d_down_bias = sums.sum(-1, dtype=kernels.accumulation_dtype(grad.dtype)).to(grad.dtype)
    if wants[3]:
        d_down = weight_gradient(library, grad, pairs, top_k, weighted_act, offsets, False)
    del weighted_act
    if wants[4]:
        d_up_bias = expert_sums(h, tokens_per_expert, offsets)
    if wants[0]:
        d_x = rows_product(library, h, offsets, up, False)
        if inverse is not None:
            d_x = kernels.sum_rows(d_x, inverse, None, top_k)
    if wants[2]:
        d_up = weight_gradient(library, x, pairs, top_k, h, offsets, True)
    return d_x, d_weights if wants[1] else None, d_up, d_down, d_up_bias, d_down_bias


def bias_dots(
    grad: Tensor, down_bias: Tensor, inverse: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    """(T, K): ``<down_bias[expert of the pair], grad[t]>``, what the bias adds to d_weights."""
    by_expert = grad @ down_bias.T.to(grad.dtype)  # (T, E)
    experts = torch.searchsorted(offsets.to(inverse.dtype), inverse, right=True)
    return by_expert.gather(1, experts.view(like.shape)).to(like.dtype)


def _pairs(x: Tensor, order: Tensor | None) -> Tensor:
    """The (token, slot) pair of each row."""
    return torch.arange(x.shape[0], device=x.device) if order is None else order
