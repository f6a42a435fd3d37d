"""Frozen weights of experts that are made for each GEMM and freed after it.

A stack that is stored in another form, 4 bits for example, is whole only while one grouped GEMM
reads it: the forward pass makes it, and so does the backward pass, in which a frozen weight needs
neither its own gradient nor the rows that it was multiplied with. Saved for the backward pass as
autograd would, the stacks of all layers would be in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrozenWeight:
    """A stack of weights that can be made at any time, always with the same values.

    Args:
        stored: makes the stack (E, M, D) in a dtype; a new tensor that it doesn't keep.
        shape: (E, M, D), or (E, D, M) if ``is_transposed``.
        is_transposed: whether the last two dimensions are exchanged after making it.
    """

    stored: Callable[[torch.dtype], Tensor]
    shape: tuple[int, ...]
    is_transposed: bool = False

    def make(self, dtype: torch.dtype) -> Tensor:
        """The stack, of :attr:`shape`; the caller should soon let go of it."""
        made = self.stored(dtype)
        return made.transpose(1, 2) if self.is_transposed else made

    def transpose(self, dim0: int, dim1: int) -> FrozenWeight:
        """The same with its last two dimensions exchanged; it takes no others."""
        assert {dim0, dim1} == {1, 2}
        shape = (self.shape[0], self.shape[2], self.shape[1])
        return replace(self, shape=shape, is_transposed=not self.is_transposed)


class _FrozenLinear(torch.autograd.Function):
    """``multiply(x, weight, tokens_per_expert)``, whose backward makes the weight again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tokens_per_expert: Tensor,
        weight: FrozenWeight,
        multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.weight, ctx.multiply = weight, multiply
        ctx.save_for_backward(tokens_per_expert)
        return multiply(x, weight.make(x.dtype), tokens_per_expert)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (tokens_per_expert,) = ctx.saved_tensors
        back = ctx.weight.transpose(1, 2)
        grad = grads[0].contiguous()
        return _FrozenLinear.apply(grad, tokens_per_expert, back, ctx.multiply), None, None, None


def frozen_linear(
    x: Tensor,
    weight: FrozenWeight,
    tokens_per_expert: Tensor,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """``multiply(x, weight, tokens_per_expert)``, with a weight that isn't kept.

    Args:
        x: (N, D), rows grouped by expert; its dtype is that of the GEMM.
        weight: (E, M, D).
        tokens_per_expert: (E,) int64.
        multiply: :func:`~lightning_fastmoe.ops.grouped_linear.grouped_linear`.

    Returns:
        (N, M), differentiable by ``x``, also twice.
    """
    out: Tensor = _FrozenLinear.apply(x, tokens_per_expert, weight, multiply)
    return out
