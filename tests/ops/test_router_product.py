"""Logits of bf16 tokens and weights: what surrounds the bf16 products, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.ops.router_product import LONGEST_CHUNK, TensorCoreProduct, chunks_of


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of both signs, over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (6 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 4)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("width", [64, 24])
def test_equals_the_product_in_fp64(width: int):
    x = numbers(37, width, seed=1).bfloat16().requires_grad_()
    weight = numbers(5, width, seed=2).bfloat16().requires_grad_()
    gradient = numbers(37, 5, seed=3).float()
    logits = TensorCoreProduct.apply(x, weight)
    logits.backward(gradient)
    wide_x, wide_weight = x.detach().double(), weight.detach().double()
    exact = wide_x @ wide_weight.T
    terms = wide_x.abs() @ wide_weight.abs().T
    assert logits.dtype == torch.float32
    assert ((logits - exact).abs() / terms).max() < width * 2**-24
    wide = gradient.double()
    for found, right, terms in (
        (x.grad, wide @ wide_weight, wide.abs() @ wide_weight.abs()),
        (weight.grad, wide.T @ wide_x, wide.abs().T @ wide_x.abs()),
    ):
        assert found.dtype == torch.bfloat16
        # Rounded once; what two bf16 numbers leave out of the gradient is below 2^-16 of it.
        assert ((found - right).abs() <= right.abs() * 2**-8 + terms * 2**-15).all()


@pytest.mark.parametrize(
    ("terms", "chunks"),
    [(64, 8), (512, 8), (1024, 8), (1536, 8), (2048, 8), (2880, 12), (4096, 16), (7168, 28)],
)
def test_chunks_are_short_and_aligned(terms: int, chunks: int):
    assert chunks_of(terms) == chunks
    assert terms // chunks <= LONGEST_CHUNK
    assert terms % (8 * chunks) == 0


@pytest.mark.parametrize("terms", [1, 8, 60, 1000 + 4])
def test_sums_that_have_no_such_chunks(terms: int):
    assert chunks_of(terms) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_elsewhere_it_is_the_fp32_product(dtype: torch.dtype):
    x, weight = numbers(7, 24).to(dtype), numbers(5, 24, seed=1).float()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(ops.router_logits(x, weight), x.to(wide) @ weight.to(wide).T)


def test_no_gradient_is_computed_that_nobody_asks_for():
    x = numbers(3, 64).bfloat16()
    weight = numbers(2, 64).bfloat16().requires_grad_()
    TensorCoreProduct.apply(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
