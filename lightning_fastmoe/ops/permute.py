"""Permute tokens into expert order, and combine them by weighted sums.

Both directions are gathers in forward *and* backward: a row that is read K times collects its
gradient by summing K rows in a fixed order, so nothing needs atomics or ``index_add_`` and every
run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return kernels.permute_rows(x, order, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return kernels.sum_rows(grads[0], inverse, None, ctx.top_k), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, inverse)
        return kernels.sum_rows(y, inverse, weights, weights.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, order, inverse = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        dy, dw = kernels.unpermute_backward(grads[0], y, weights, order, inverse, wanted)
        return dy, dw, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor, top_k: int = 1) -> Tensor:
    """Copies each token once per chosen expert, in expert-major order.

    Args:
        x: (T, D).
        order: (T*K,) int64, the flat (token, slot) pair of each output row.
        inverse: (T*K,) int64, the inverse of ``order``.
        top_k: K.

    Returns:
        (T*K, D). Its gradient is a sum over K rows in slot order, accumulated in fp32 for half
        precisions.
    """
    return _Permute.apply(x, order, inverse, top_k)  # type: ignore[no-any-return]


def unpermute(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Each token's weighted sum of its K rows, in slot order, accumulated in fp32.

    Args:
        y: (T*K, D) expert outputs in expert-major order.
        weights: (T, K), usually fp32.
        order: (T*K,) int64, as for :func:`permute`.
        inverse: (T*K,) int64.

    Returns:
        (T, D) in the dtype of ``y``.
    """
    return _Unpermute.apply(y, weights, order, inverse)  # type: ignore[no-any-return]
