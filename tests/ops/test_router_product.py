"""Logits of bf16 tokens: their split into bf16 products against fp64, and when it is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.ops.router_product import SplitProduct, split


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of both signs, over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (6 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 4)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_three_bf16_numbers_are_an_fp32_number():
    x = numbers(1000).float()
    parts = split(x, 3)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())
    two = sum(part.double() for part in split(x, 2))
    assert (two - x.double()).abs().max() > 0
    assert ((two - x.double()) / x.double()).abs().max() < 2**-16


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_equals_the_product_in_fp64(weight_dtype: torch.dtype):
    x = numbers(37, 24, seed=1).bfloat16().requires_grad_()
    weight = numbers(5, 24, seed=2).to(weight_dtype).requires_grad_()
    gradient = numbers(37, 5, seed=3).float()
    logits = SplitProduct.apply(x, weight)
    logits.backward(gradient)
    wide_x, wide_weight = x.detach().double(), weight.detach().double()
    exact = wide_x @ wide_weight.T
    terms = wide_x.abs() @ wide_weight.abs().T
    assert logits.dtype == torch.float32
    assert ((logits - exact).abs() / terms).max() < 24 * 2**-24
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == weight_dtype
    of_x = gradient.double() @ wide_weight
    terms = gradient.double().abs() @ wide_weight.abs()
    # Rounded to bf16 once; the parts left out are below 2^-16 of each term.
    assert ((x.grad - of_x).abs() <= of_x.abs() * 2**-8 + terms * 2**-15).all()
    of_weight = gradient.double().T @ wide_x
    terms = gradient.double().abs().T @ wide_x.abs()
    if weight_dtype == torch.float32:
        assert ((weight.grad - of_weight).abs() / terms).max() < 37 * 2**-24
    else:
        assert ((weight.grad - of_weight).abs() <= of_weight.abs() * 2**-8 + terms * 2**-15).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_elsewhere_it_is_the_fp32_product(dtype: torch.dtype):
    x, weight = numbers(7, 24).to(dtype), numbers(5, 24, seed=1).float()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(ops.router_logits(x, weight), x.to(wide) @ weight.to(wide).T)


def test_no_gradient_is_computed_that_nobody_asks_for():
    x = numbers(3, 8).bfloat16()
    weight = numbers(2, 8).float().requires_grad_()
    SplitProduct.apply(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
