"""A router's logits: a product with the precision of fp32, on the tensor cores for tokens in bf16.

On a GPU of compute capability 9.0 :mod:`~lightning_fastmoe.ops.products.router` computes it. On
others a weight in bf16 takes part as follows, and one in fp32 is multiplied in fp32: it would need
three such products, which is no faster.

A tensor core multiplies bf16 numbers exactly, but truncates its fp32 sums where an fp32 instruction
rounds them: on an H100, the logits of 2048 terms came out 13 times as far from the exact ones. So a
sum is cut into short ones, which fp32 instructions add; that brings it to 1.4 times. An fp32
gradient takes part as the sum of two bf16 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.ops.double_backward import differentiable_gradients
from lightning_fastmoe.ops.native import TRACED_NAMESPACE
from lightning_fastmoe.ops.operator import differentiate, fake_of, operator
from lightning_fastmoe.ops.products import router as kernels

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
    half = x.is_cuda and x.dtype == torch.bfloat16
    if half and weight.dtype in (torch.bfloat16, torch.float32):
        if torch.compiler.is_dynamo_compiling():
            traced: Tensor = logits_of_half(x.contiguous(), weight.contiguous())
            return traced
        found: Tensor = RouterProduct.apply(x.contiguous(), weight.contiguous())
        return found
    return _plain_logits(x, weight)


def _plain_logits(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype))


class RouterProduct(torch.autograd.Function):
    """``x @ weight.T`` in fp32 of tokens in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """``x (T, D)`` bf16, ``weight (E, D)`` bf16 or fp32 -> (T, E) fp32."""
        ctx.save_for_backward(x, weight)
        return _logits(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``gradient (T, E)`` fp32 -> those of x and the weight, in their dtypes."""
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad
            of_x, of_weight = differentiable_gradients(_plain_logits, (x, weight), gradient, wanted)
            return of_x, of_weight
        return _gradients(gradient, x, weight, *ctx.needs_input_grad)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    if (library := kernels.router_kernels(x, weight)) is not None:
        return kernels.logits(library, x, weight)
    chunks = chunks_of(x.shape[1])
    if weight.dtype != torch.bfloat16 or chunks is None:
        return _plain_logits(x, weight)
    a = x.unflatten(1, (chunks, -1)).transpose(0, 1)
    b = weight.T.unflatten(0, (chunks, -1))
    return _batched_product(a, b).sum(0)


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if (library := kernels.router_kernels(x, weight)) is not None:
        return kernels.gradients(library, gradient, x, weight, wants_x, wants_weight)
    of_x = of_weight = None
    if weight.dtype != torch.bfloat16:
        of_x = (gradient @ weight).to(x.dtype) if wants_x else None
        return of_x, gradient.T @ x.to(gradient.dtype) if wants_weight else None
    high = gradient.to(torch.bfloat16)
    both = torch.cat([high, (gradient - high).to(torch.bfloat16)], 1)  # (T, 2 E)
    if wants_x:
        of_x = _rounded_product(both, torch.cat([weight, weight]))
    if wants_weight:
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


# In graphs of torch.compile it is an operator.


@operator(f"{TRACED_NAMESPACE}::router_logits")
def logits_of_half(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`router_logits` of tokens in bf16, both contiguous."""
    with torch.no_grad():
        return _logits(x, weight)


@operator(f"{TRACED_NAMESPACE}::router_gradients")
def gradients_of_half(
    gradient: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`logits_of_half`'s arguments; without elements if not wanted."""
    with torch.no_grad():
        of_x, of_weight = _gradients(gradient, x, weight, wants_x, wants_weight)
    return (
        x.new_empty(0) if of_x is None else of_x,
        weight.new_empty(0) if of_weight is None else of_weight,
    )


@fake_of(logits_of_half)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@fake_of(gradients_of_half)
def _(
    gradient: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if wants_x else x.new_empty(0),
        torch.empty_like(weight) if wants_weight else weight.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad
    of_x, of_weight = gradients_of_half(gradient, x, weight, wants_x, wants_weight)
    return of_x if wants_x else None, of_weight if wants_weight else None


differentiate(logits_of_half, _backward, setup_context=_save)
