"""A router's products by the kernels of ``csrc/hopper/router_product.cu``.

A bf16 number times another has at most 16 significant bits, so tensor cores, which add in fp32,
multiply exactly. An fp32 number is the sum of three bf16 numbers. So where tokens are in bf16, the
product with a weight in fp32 is that of tokens with three bf16 matrices, at fifteen times the rate
of fp32 instructions. How its sums are kept as exact as those of fp32 is in router_product.cuh.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.ops.products.hopper import hopper


def router_kernels(x: Tensor, weight: Tensor) -> Any | None:
    """The operators, if they support these tensors, else None.

    Args:
        x: (T, D), bf16.
        weight: (E, D), bf16 or fp32.
    """
    if x.dtype != torch.bfloat16 or weight.dtype not in (torch.bfloat16, torch.float32):
        return None
    if weight.device != x.device or not weight.is_contiguous():
        return None
    return hopper(x, weight) if weight.dtype == torch.bfloat16 else hopper(x)


def logits(library: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32.

    Args:
        library: what :func:`router_kernels` returned for ``x`` and ``weight``.
        x: (T, D).
        weight: (E, D).

    Returns:
        (T, E).
    """
    found: Tensor = library.hopper_router_logits(x, _parts_of_weight(library, weight))
    return found


def gradients(
    library: Any, gradient: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the tokens and the weight, in their dtypes.

    What is rounded to bf16 in the end gets the two larger parts of each fp32 number, which are
    exact to 2^-17; the gradient of a weight in fp32 gets all three.

    Args:
        library: what :func:`router_kernels` returned for ``x`` and ``weight``.
        gradient: (T, E) fp32, of the logits.
        x: (T, D).
        weight: (E, D).
        wants_x: whether the former is wanted.
        wants_weight: whether the latter is.
    """
    num_experts, exact = weight.shape[0], weight.dtype == torch.float32
    # Of each token: low, middle, high, high; for a weight in bf16 middle, high.
    parts = library.hopper_bf16_parts(gradient.contiguous(), 4 if exact else 2)
    of_x = of_weight = None
    if wants_x:
        # Middle times high, high times high, high times middle; what is left out is below 2^-16.
        factors = [weight, weight]
        if exact:
            _, middle, high = _parts_of_weight(library, weight).unbind(1)
            factors = [high, high, middle]
        if padding := parts.shape[2] - num_experts:
            factors = [F.pad(factor, (0, 0, 0, padding)) for factor in factors]
        of_x = parts[:, -len(factors) :].flatten(1) @ torch.cat(factors)
    if wants_weight:
        of_weight = library.hopper_router_weight_gradient(
            x, parts, 3 if exact else 2, num_experts, not exact
        )
    return of_x, of_weight


def _parts_of_weight(library: Any, weight: Tensor) -> Tensor:
    """(E, D) -> (E, parts, D), bf16, the smallest first."""
    if weight.dtype == torch.bfloat16:
        return weight.unsqueeze(1)
    parts: Tensor = library.hopper_bf16_parts(weight, 3)
    return parts
