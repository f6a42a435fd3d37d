"""A router's logits: bf16 tokens times its weights on the tensor cores, as precise as in fp32.

A tensor core multiplies bf16 numbers exactly and sums in fp32. An fp32 number is the sum of three
bf16 numbers, so a product with an fp32 matrix is the sum of three products with bf16 matrices; one
with the bf16 weights of mixed precision is exact as it is. What differs from an fp32 product is
the rounding of sums, which tensor cores truncate; long ones are therefore cut into up to
:data:`CHUNKS`, which are then added by fp32 instructions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNKS = 8
SHORTEST_CHUNK = 512
"""In terms of a sum."""


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32, or in fp64 for tokens in fp64.

    Args:
        x: (T, D), in any floating dtype.
        weight: (E, D), in any floating dtype.

    Returns:
        (T, E) in fp32 or fp64. Gradients have the dtypes of the arguments.
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.float32):
        logits: Tensor = SplitProduct.apply(x, weight)
        return logits
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype))


class SplitProduct(torch.autograd.Function):
    """``x @ weight.T`` and its gradients by products of bf16 matrices that are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """``x (T, D)`` bf16, ``weight (E, D)`` bf16 or fp32 -> (T, E) fp32."""
        ctx.save_for_backward(x, weight)
        parts = split(weight, _parts_of(weight))
        products = _product(x, torch.cat(parts).T)
        return products.view(x.shape[0], len(parts), -1).sum(1) if len(parts) > 1 else products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``gradient (T, E)`` fp32 -> those of x and the weight, in their dtypes."""
        x, weight = ctx.saved_tensors
        # As many parts as the result's rounding leaves visible: x's gradient is bf16.
        parts = split(gradient, max(2, _parts_of(weight)))
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            high, low = parts[:2]
            factors = split(weight, min(2, _parts_of(weight)))
            left = [high, low] if len(factors) == 1 else [high, low, high]
            right = factors * 2 if len(factors) == 1 else [factors[0], factors[0], factors[1]]
            of_x = _rounded_product(torch.cat(left, 1), torch.cat(right))
        if ctx.needs_input_grad[1]:
            products = _product(torch.cat(parts, 1).T, x)
            of_weight = products.view(len(parts), *weight.shape).sum(0).to(weight.dtype)
        return of_x, of_weight


def split(x: Tensor, parts: int) -> list[Tensor]:
    """``parts`` bf16 tensors whose sum is ``x``: exactly, for three of an fp32 tensor.

    Exactly except for numbers below 2^-110 or so, whose last parts underflow, and those that round
    to infinity in bf16.
    """
    found = []
    for _ in range(parts - 1):
        high = x.to(torch.bfloat16)
        found.append(high)
        x = x - high
    return [*found, x.to(torch.bfloat16)]


def _parts_of(weight: Tensor) -> int:
    return 1 if weight.dtype == torch.bfloat16 else 3


def _rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """``a (m, k) @ b (k, n)``, bf16 matrices, summed in fp32 and rounded to bf16."""
    return a @ b if a.is_cuda else (a.float() @ b.float()).to(a.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a (m, k) @ b (k, n)``, bf16 matrices, summed in fp32 -> fp32."""
    if not a.is_cuda:  # to test the split where there are no tensor cores
        return a.float() @ b.float()
    chunks = _chunks(a.shape[1])
    if chunks == 1:
        return torch.mm(a, b, out_dtype=torch.float32)
    a, b = a.unflatten(1, (chunks, -1)).transpose(0, 1), b.unflatten(0, (chunks, -1))
    return torch.bmm(a, b, out_dtype=torch.float32).sum(0)


def _chunks(terms: int) -> int:
    """The number of equal chunks of a sum; a multiple of 8 terms each, for aligned loads."""
    most = min(CHUNKS, terms // SHORTEST_CHUNK)
    return next((c for c in range(most, 1, -1) if terms % (8 * c) == 0), 1)
