"""Logits on the tensor cores: as close to fp64 as the product in fp32, and the same choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.ops import native, router_product
from lightning_fastmoe.ops.products import router as kernels
from lightning_fastmoe.ops.products.hopper import hopper

SIZES = [
    (4096, 1024, 64),
    (24576, 1536, 128),
    (4096, 2048, 128),
    (1000, 2880, 60),
    (77, 4096, 8),
    (8192, 7168, 256),
    (130, 1000, 33),
    (1, 64, 1),
    (4100, 72, 320),
]
"""(T, D, E)."""
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(params=["own kernels", "cuBLAS"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the products are computed."""
    if request.param == "cuBLAS":
        monkeypatch.setattr(kernels, "router_kernels", lambda *tensors: None)
    elif hopper(torch.empty(1, 8, device="cuda", dtype=torch.bfloat16)) is None:
        pytest.skip("needs a GPU of compute capability 9.0")
    return str(request.param)


def problem(tokens: int, width: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(experts, width, device="cuda") * 0.02).to(dtype).requires_grad_()
    return x, weight, torch.randn(tokens, experts, device="cuda")


def results(logits: Tensor, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    of_x, of_weight = torch.autograd.grad(logits, (x, weight), gradient.to(logits.dtype))
    assert of_x.dtype == x.dtype
    assert of_weight.dtype == weight.dtype
    return [logits.detach().double(), of_x.double(), of_weight.double()]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_errors_are_at_most_twice_those_of_fp32(
    sizes: tuple[int, int, int], dtype: torch.dtype, place: str
) -> None:
    x, weight, gradient = problem(*sizes, dtype)
    assert not torch.backends.cuda.matmul.allow_tf32
    wide, wide_x, wide_weight = gradient.double(), x.detach().double(), weight.detach().double()
    exact = [wide_x @ wide_weight.T, wide @ wide_weight, wide.T @ wide_x]
    plain = results(F.linear(x.float(), weight.float()), x, weight, gradient)
    logits = ops.router_logits(x, weight)
    assert logits.dtype == torch.float32
    found = results(logits, x, weight, gradient)
    for name, ours, theirs, right in zip("yxw", found, plain, exact, strict=True):
        # Short sums in fp32 may be exact by chance.
        assert error(ours, right) <= max(2 * error(theirs, right), 2**-23), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_chooses_the_same_experts_but_for_logits_that_agree(dtype: torch.dtype, place: str) -> None:
    x, weight, _ = problem(8192, 2048, 64, dtype)
    logits, plain = ops.router_logits(x, weight), F.linear(x.float(), weight.float())
    exact = F.linear(x.double(), weight.double())
    ours, theirs = (one.topk(8).indices.sort(1).values for one in (logits, plain))
    other = (ours != theirs).any(1)
    assert int(other.sum()) < 20
    eighth = exact.sort(1, descending=True).values[other][:, 7:9]
    bound = 4 * float((plain - exact).abs().max())
    assert bool((eighth[:, 0] - eighth[:, 1] < bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(4096, 2048, 64), (4097, 1536, 200)])
def test_the_same_bits_each_time(sizes: tuple[int, int, int], dtype: torch.dtype, place: str):
    x, weight, gradient = problem(*sizes, dtype)
    first, second = (results(ops.router_logits(x, weight), x, weight, gradient) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["own kernels"], indirect=True)
def test_logits_of_a_token_do_not_depend_on_others(dtype: torch.dtype, place: str) -> None:
    x, weight, _ = problem(1000, 1024, 96, dtype)
    whole = ops.router_logits(x, weight)
    for some in (slice(0, 1), slice(300, 437), slice(128, 1000)):
        assert torch.equal(whole[some], ops.router_logits(x[some].contiguous(), weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["own kernels"], indirect=True)
def test_large_and_small_numbers(dtype: torch.dtype, place: str) -> None:
    """Over twelve orders of magnitude, in every element: each is within fp32's bound."""
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        size = 10 ** (12 * torch.rand(*shape, generator=generator, device="cuda") - 6)
        return size * torch.randn(*shape, generator=generator, device="cuda")

    x, weight = numbers(300, 512).bfloat16(), numbers(40, 512).to(dtype)
    gradient = numbers(300, 40)
    library = kernels.router_kernels(x, weight)
    logits = kernels.logits(library, x, weight).double()
    of_x, of_weight = kernels.gradients(library, gradient, x, weight, True, True)
    assert of_x is not None
    assert of_weight is not None
    for found, a, b, bound in (
        (logits, x, weight.T, 512 * 2**-24),
        (of_x, gradient, weight, 2**-8),
        (of_weight, gradient.T, x, 300 * 2**-24 if dtype == torch.float32 else 2**-8),
    ):
        exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert bool(((found.double() - exact).abs() <= bound * terms).all())


@pytest.mark.parametrize("place", ["own kernels"], indirect=True)
def test_parts_are_what_they_are_parts_of(place: str) -> None:
    library = native.load()
    assert library is not None
    torch.manual_seed(0)
    x = torch.randn(57, 41, device="cuda") * 10 ** (20 * torch.rand(57, 41, device="cuda") - 10)
    x[0, :8] = torch.tensor([0, -0.0, 1, 2**-100, -1e30, 1 + 2**-23, 3e38, -(2.0**127)])
    for count in (2, 3, 4):
        parts = library.hopper_bf16_parts(x, count)
        assert parts.shape == (57, count, 48)
        assert not parts[:, :, 41:].any()
        three = parts[:, :3, :41].double()
        if count == 2:
            assert bool(((three.sum(1) - x.double()).abs() <= x.double().abs() * 2**-16).all())
        else:
            assert torch.equal(three.sum(1), x.double())
        assert torch.equal(parts[:, -1, :41], x.bfloat16())
    for value in (float("inf"), float("-inf"), torch.finfo(torch.float32).max):
        (row,) = library.hopper_bf16_parts(torch.full((1, 8), value, device="cuda"), 3)
        assert row[2].isinf().all()
        assert not row[:2].any()
    (row,) = library.hopper_bf16_parts(torch.full((1, 8), float("nan"), device="cuda"), 3)
    assert row[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_and_one_of_many_gradients(dtype: torch.dtype, place: str) -> None:
    x, weight, _ = problem(0, 64, 5, dtype)
    logits = ops.router_logits(x, weight)
    assert logits.shape == (0, 5)
    of_x, of_weight = torch.autograd.grad(logits.sum(), (x, weight))
    assert of_x.shape == (0, 64)
    assert not of_weight.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_a_graph_it_is_an_operator(dtype: torch.dtype, place: str) -> None:
    x, weight, gradient = problem(256, 512, 24, dtype)
    torch.library.opcheck(router_product.logits_of_half, (x, weight))
    compiled: Callable[..., Tensor] = torch.compile(ops.router_logits, fullgraph=True)
    plain = results(ops.router_logits(x, weight), x, weight, gradient)
    for ours, right in zip(results(compiled(x, weight), x, weight, gradient), plain, strict=True):
        assert torch.equal(ours, right)
