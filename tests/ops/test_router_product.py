"""Logits of tokens in bf16: what surrounds the bf16 products, against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.slow_products import SlowRouterProducts
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.ops import router_product
from lightning_fastmoe.ops.products import router as kernels
from lightning_fastmoe.ops.router_product import LONGEST_CHUNK, RouterProduct, chunks_of

DTYPES = [torch.bfloat16, torch.float32]
PLACES = ["by PyTorch", "by kernels"]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of both signs, over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (6 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 4)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the products computed in one of the places."""

    def choose(place: str) -> None:
        library: Any = SlowRouterProducts() if place == "by kernels" else None
        monkeypatch.setattr(kernels, "router_kernels", lambda *tensors: library)

    return choose


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "experts"), [(64, 5), (24, 5), (64, 16)])
def test_equals_the_product_in_fp64(
    width: int, experts: int, dtype: torch.dtype, place: str, compute: Callable[[str], None]
) -> None:
    compute(place)
    x = numbers(37, width, seed=1).bfloat16().requires_grad_()
    weight = numbers(experts, width, seed=2).to(dtype).requires_grad_()
    gradient = numbers(37, experts, seed=3).float()
    logits = RouterProduct.apply(x, weight)
    logits.backward(gradient)
    wide_x, wide_weight = x.detach().double(), weight.detach().double()
    exact = wide_x @ wide_weight.T
    terms = wide_x.abs() @ wide_weight.abs().T
    assert logits.dtype == torch.float32
    assert ((logits - exact).abs() / terms).max() < width * 2**-24
    wide = gradient.double()
    for leaf, right, terms in (
        (x, wide @ wide_weight, wide.abs() @ wide_weight.abs()),
        (weight, wide.T @ wide_x, wide.abs().T @ wide_x.abs()),
    ):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        # Rounded once; what two bf16 numbers leave out of an fp32 one is below 2^-16 of it.
        once, of_terms = (2**-8, 2**-15) if leaf.dtype == torch.bfloat16 else (2**-23, 2**-18)
        assert ((leaf.grad - right).abs() <= right.abs() * once + terms * of_terms).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives(dtype: torch.dtype, place: str, compute: Callable[[str], None]) -> None:
    compute(place)
    x = numbers(7, 64, seed=1).bfloat16().requires_grad_()
    weight = numbers(5, 64, seed=2).to(dtype).requires_grad_()

    def second(logits: Tensor) -> tuple[Tensor, ...]:
        squares = logits.square().sum()
        of_x, of_weight = torch.autograd.grad(squares, (x, weight), create_graph=True)
        return torch.autograd.grad(of_x.float().sum() + of_weight.float().sum(), (x, weight))

    found, wanted = second(RouterProduct.apply(x, weight)), second(x.float() @ weight.float().T)
    for ours, right in zip(found, wanted, strict=True):
        assert (ours - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize(
    ("terms", "chunks"),
    [(64, 8), (512, 8), (1024, 8), (1536, 8), (2048, 8), (2880, 12), (4096, 16), (7168, 28)],
)
def test_chunks_are_short_and_aligned(terms: int, chunks: int) -> None:
    assert chunks_of(terms) == chunks
    assert terms // chunks <= LONGEST_CHUNK
    assert terms % (8 * chunks) == 0


@pytest.mark.parametrize("terms", [1, 8, 60, 1000 + 4])
def test_sums_that_have_no_such_chunks(terms: int) -> None:
    assert chunks_of(terms) is None
    x, weight = (numbers(n, terms, seed=n).bfloat16() for n in (3, 4))
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T * (terms * 2**-24)
    assert ((RouterProduct.apply(x, weight) - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_elsewhere_it_is_the_fp32_product(dtype: torch.dtype) -> None:
    x, weight = numbers(7, 24).to(dtype), numbers(5, 24, seed=1).float()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(ops.router_logits(x, weight), x.to(wide) @ weight.to(wide).T)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_is_computed_that_nobody_asks_for(
    dtype: torch.dtype, place: str, compute: Callable[[str], None]
) -> None:
    compute(place)
    for wants_x in (True, False):
        x = numbers(3, 64).bfloat16().requires_grad_(wants_x)
        weight = numbers(2, 64).to(dtype).requires_grad_(not wants_x)
        RouterProduct.apply(x, weight).sum().backward()
        assert (x.grad is not None) == wants_x
        assert (weight.grad is not None) != wants_x


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_an_operator_in_graphs(dtype: torch.dtype) -> None:
    x = numbers(9, 64, seed=1).bfloat16().requires_grad_()
    weight = numbers(5, 64, seed=2).to(dtype).requires_grad_()
    torch.library.opcheck(router_product.logits_of_half, (x, weight))
    gradient = numbers(9, 5, seed=3).float()
    found = torch.autograd.grad(router_product.logits_of_half(x, weight), (x, weight), gradient)
    wanted = torch.autograd.grad(RouterProduct.apply(x, weight), (x, weight), gradient)
    for ours, right in zip(found, wanted, strict=True):
        assert torch.equal(ours, right)
    for wants in ((True, True), (True, False), (False, True)):
        given = (gradient, x.detach(), weight.detach(), *wants)
        torch.library.opcheck(router_product.gradients_of_half, given)
