"""Logits on the tensor cores: as close to fp64 as the product in fp32, and the same choices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe import ops

SIZES = [
    (4096, 1024, 64),
    (24576, 1536, 128),
    (4096, 2048, 128),
    (1000, 2880, 60),
    (77, 4096, 8),
    (8192, 7168, 256),
]


def problem(tokens: int, width: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(experts, width, device="cuda") * 0.02).to(dtype).requires_grad_()
    return x, weight, torch.randn(tokens, experts, device="cuda")


def results(logits: Tensor, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    of_x, of_weight = torch.autograd.grad(logits, (x, weight), gradient.to(logits.dtype))
    return [logits.detach().double(), of_x.double(), of_weight.double()]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("sizes", SIZES)
def test_errors_are_at_most_twice_those_of_fp32(sizes: tuple[int, int, int]) -> None:
    x, weight, gradient = problem(*sizes, torch.bfloat16)
    assert not torch.backends.cuda.matmul.allow_tf32
    wide, wide_x, wide_weight = gradient.double(), x.detach().double(), weight.detach().double()
    exact = [wide_x @ wide_weight.T, wide @ wide_weight, wide.T @ wide_x]
    plain = results(F.linear(x.float(), weight.float()), x, weight, gradient)
    logits = ops.router_logits(x, weight)
    assert logits.dtype == torch.float32
    assert "TensorCoreProduct" in str(logits.grad_fn)
    found = results(logits, x, weight, gradient)
    for name, ours, theirs, right in zip("yxw", found, plain, exact, strict=True):
        assert error(ours, right) <= 2 * error(theirs, right), name


def test_weights_in_fp32_are_multiplied_in_fp32() -> None:
    x, weight, _ = problem(1000, 1024, 64, torch.float32)
    assert torch.equal(ops.router_logits(x, weight), F.linear(x.float(), weight))


def test_chooses_the_same_experts_but_for_logits_that_agree() -> None:
    x, weight, _ = problem(8192, 2048, 64, torch.bfloat16)
    logits, plain = ops.router_logits(x, weight), F.linear(x.float(), weight.float())
    exact = F.linear(x.double(), weight.double())
    ours, theirs = (one.topk(8).indices.sort(1).values for one in (logits, plain))
    other = (ours != theirs).any(1)
    assert int(other.sum()) < 20
    eighth = exact.sort(1, descending=True).values[other][:, 7:9]
    bound = 4 * float((plain - exact).abs().max())
    assert bool((eighth[:, 0] - eighth[:, 1] < bound).all())


def test_the_same_bits_each_time() -> None:
    x, weight, gradient = problem(4096, 2048, 64, torch.bfloat16)
    first, second = (results(ops.router_logits(x, weight), x, weight, gradient) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
