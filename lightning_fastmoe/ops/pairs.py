"""Permute and combine for a varying number of rows per token: expert choice, dropped slots.

As in :mod:`~lightning_fastmoe.ops.permute`, both directions are gathers and sums in a fixed order,
forward and backward, so nothing needs atomics and every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops.kernels import accumulation_dtype, rounded


@dataclass(frozen=True)
class PairOrder:
    """Rows in expert-major order, and how to gather each token's rows.

    Example: ``token = [2, 0, 2, 1]`` with T=4 gives ``by_token = [1, 3, 0, 2]`` and
    ``lengths = [1, 1, 2, 0]``.

    Attributes:
        token: (N,) int64, the token of each row.
        by_token: (N,) int64, the rows of token 0, then of token 1, ...
        lengths: (T,) int64, rows per token.
    """

    token: Tensor
    by_token: Tensor
    lengths: Tensor


def order_pairs(token: Tensor, num_tokens: int) -> PairOrder:
    """The :class:`PairOrder` of rows of tokens ``token (N,)``. No host sync."""
    sorted_tokens, by_token = torch.sort(token, stable=True)
    edges = torch.searchsorted(
        sorted_tokens, torch.arange(num_tokens + 1, device=token.device, dtype=token.dtype)
    )
    return PairOrder(token, by_token, edges[1:] - edges[:-1])


def _sum_by_token(rows: Tensor, pairs: PairOrder, dtype: torch.dtype) -> Tensor:
    """Each token's sum of its rows ``(N, D)``, in expert order -> (T, D) in ``dtype``."""
    if not rows.shape[0]:
        return rows.new_zeros((pairs.lengths.shape[0], rows.shape[1]), dtype=dtype)
    picked = rows.index_select(0, pairs.by_token).to(accumulation_dtype(rows.dtype))
    total: Tensor = torch.segment_reduce(
        picked, "sum", lengths=pairs.lengths, axis=0, unsafe=True, initial=0
    )
    return rounded(total, dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: PairOrder) -> Tensor:
        ctx.pairs = pairs
        return x.index_select(0, pairs.token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_by_token(grads[0], ctx.pairs, grads[0].dtype), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, pairs: PairOrder) -> Tensor:
        ctx.save_for_backward(y, weights)
        ctx.pairs = pairs
        acc = accumulation_dtype(y.dtype)
        return _sum_by_token(y.to(acc) * weights.to(acc).unsqueeze(-1), pairs, y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, weights = ctx.saved_tensors
        acc = accumulation_dtype(y.dtype)
        grad = grads[0].to(acc).index_select(0, ctx.pairs.token)
        dy = (grad * weights.to(acc).unsqueeze(-1)).to(y.dtype)
        dw = (grad * y.to(acc)).sum(dim=-1).to(weights.dtype)
        return dy, dw, None


def gather_rows(x: Tensor, pairs: PairOrder) -> Tensor:
    """``x (T, D) -> (N, D)``, row i being token ``pairs.token[i]``; gradients summed in fp32."""
    return _GatherRows.apply(x, pairs)  # type: ignore[no-any-return]


def combine_rows(y: Tensor, weights: Tensor, pairs: PairOrder) -> Tensor:
    """Each token's weighted sum of its rows, accumulated in fp32; zero for a token without rows.

    Args:
        y: (N, D).
        weights: (N,), one per row.
        pairs: from :func:`order_pairs`.

    Returns:
        (T, D) in the dtype of ``y``.
    """
    return _CombineRows.apply(y, weights, pairs)  # type: ignore[no-any-return]
