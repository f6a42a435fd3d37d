"""A grouped GEMM as an operator for ``torch.compile``.

The compiler can trace ``F.grouped_mm`` in bf16 alone, and not one GEMM per expert, whose sizes the
host reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops.native import TRACED_NAMESPACE
from lightning_fastmoe.ops.operator import differentiate, fake_of, operator
from lightning_fastmoe.ops.products.torch import grouped_outer_product, grouped_product


@operator(f"{TRACED_NAMESPACE}::grouped_linear")
def grouped_linear(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """:func:`~lightning_fastmoe.ops.grouped_linear.grouped_linear` of a weight (E, M, D)."""
    return _product(x, weight.transpose(1, 2), tokens_per_expert)


@operator(f"{TRACED_NAMESPACE}::grouped_linear_backward")
def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, tokens_per_expert: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """The gradients of x (N, D) and of the weight (E, M, D), of those ``wanted``."""
    grad, found = grad.contiguous(), []
    if wanted[0]:
        found.append(_product(grad, weight, tokens_per_expert))
    if wanted[1]:
        offsets = _ends(tokens_per_expert)
        found.append(grouped_outer_product(grad, x.contiguous(), tokens_per_expert, offsets))
    return found


def _product(rows: Tensor, matrices: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return grouped_product(rows.contiguous(), matrices, tokens_per_expert, _ends(tokens_per_expert))


def _ends(tokens_per_expert: Tensor) -> Tensor:
    return torch.cumsum(tokens_per_expert, 0).to(torch.int32)


@fake_of(grouped_linear)
def _(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@fake_of(grouped_linear_backward)
def _(
    grad: Tensor, x: Tensor, weight: Tensor, tokens_per_expert: Tensor, wanted: list[bool]
) -> list[Tensor]:
    shapes = ((x.shape[0], x.shape[1]), tuple(weight.shape))
    return [x.new_empty(shape) for shape, needed in zip(shapes, wanted, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:2]]
    found = iter(grouped_linear_backward(grad, *ctx.saved_tensors, wanted))
    return *(next(found) if needed else None for needed in wanted), None


differentiate(grouped_linear, _backward, setup_context=_save)
