"""A router's logits: bf16 tokens times bf16 weights on the tensor cores, about as exact as fp32.

A tensor core multiplies bf16 numbers exactly, but truncates its fp32 sums where an fp32 instruction
rounds them: on an H100, the logits of 2048 terms came out 13 times as far from the exact ones. So a
sum is cut into short ones, which fp32 instructions add; that brings it to 1.4 times. An fp32
gradient takes part as the sum of two bf16 numbers.

fp32 weights would need three such products, which is no faster than the one in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST_CHUNKS, LONGEST_CHUNK = 8, 256
"""Of a sum; a chunk's length is in terms."""


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32, or in fp64 for tokens in fp64.

    Args:
        x: (T, D), in any floating dtype.
        weight: (E, D), in any floating dtype.

    Returns:
        (T, E) in fp32 or fp64. Gradients have the dtypes of the arguments.
    """
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and chunks_of(x.shape[1]):
        logits: Tensor = TensorCoreProduct.apply(x, weight)
        return logits
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype))


class TensorCoreProduct(torch.autograd.Function):
    """``x @ weight.T`` and its gradients by products of bf16 matrices that are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """``x (T, D)``, ``weight (E, D)``, both bf16 -> (T, E) fp32."""
        ctx.save_for_backward(x, weight)
        chunks = chunks_of(x.shape[1]) or 1
        a = x.unflatten(1, (chunks, -1)).transpose(0, 1)
        b = weight.T.unflatten(0, (chunks, -1))
        return _batched_product(a, b).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``gradient (T, E)`` fp32 -> those of x and the weight, bf16."""
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        high = gradient.to(torch.bfloat16)
        both = torch.cat([high, (gradient - high).to(torch.bfloat16)], 1)  # (T, 2 E)
        if ctx.needs_input_grad[0]:
            of_x = _rounded_product(both, torch.cat([weight, weight]))
        if ctx.needs_input_grad[1]:
            of_weight = _product(both.T, x).view(2, *weight.shape).sum(0).to(weight.dtype)
        return of_x, of_weight


def chunks_of(terms: int) -> int | None:
    """The number of equal chunks of a sum, each a multiple of 8 terms; None if there is none."""
    fewest = max(FEWEST_CHUNKS, -(-terms // LONGEST_CHUNK))
    return next((c for c in range(fewest, terms // 8 + 1) if terms % (8 * c) == 0), None)


# Where there are no tensor cores, the same products in fp32, to test what is around them.


def _batched_product(a: Tensor, b: Tensor) -> Tensor:
    """``a (n, m, k) @ b (n, k, l)``, bf16, summed in fp32 -> fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a (m, k) @ b (k, l)``, bf16, summed in fp32 -> fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """``a (m, k) @ b (k, l)``, bf16, summed in fp32 -> bf16."""
    return a @ b if a.is_cuda else (a.float() @ b.float()).to(a.dtype)
