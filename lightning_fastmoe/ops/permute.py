"""Tokens into expert order, and the weighted sum back.

Both directions are gathers in forward *and* backward: a row that is read K times collects its
gradient by summing K rows in a fixed order, so nothing needs atomics or ``index_add_`` and every
run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the half precisions, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape, ctx.top_k = x.shape, top_k
        rows = order if top_k == 1 else torch.div(order, top_k, rounding_mode="floor")
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (inverse,) = ctx.saved_tensors
        tokens, width = ctx.shape
        picked = grad.index_select(0, inverse)
        if ctx.top_k == 1:
            return picked, None, None, None
        acc = _accumulation_dtype(grad.dtype)
        dx = picked.view(tokens, ctx.top_k, width).sum(dim=1, dtype=acc).to(grad.dtype)
        return dx, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, inverse)
        tokens, top_k = weights.shape
        acc = _accumulation_dtype(y.dtype)
        picked = y.index_select(0, inverse).view(tokens, top_k, y.shape[1]).to(acc)
        return (picked * weights.to(acc).unsqueeze(-1)).sum(dim=1).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        y, weights, order, inverse = ctx.saved_tensors
        tokens, top_k = weights.shape
        acc = _accumulation_dtype(y.dtype)
        dy = dw = None
        grad_acc = grad.to(acc)
        if ctx.needs_input_grad[0]:
            rows = torch.div(order, top_k, rounding_mode="floor")
            row_weights = weights.reshape(-1).index_select(0, order).to(acc)
            dy = (grad_acc.index_select(0, rows) * row_weights.unsqueeze(-1)).to(y.dtype)
        if ctx.needs_input_grad[1]:
            picked = y.index_select(0, inverse).view(tokens, top_k, y.shape[1]).to(acc)
            dw = (picked * grad_acc.unsqueeze(1)).sum(dim=-1).to(weights.dtype)
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
