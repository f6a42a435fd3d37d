"""Autograd functions that torch.compile traces: the gradients of the same functions in Python."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lightning_fastmoe import ops
from lightning_fastmoe.ops.pairs import combine_rows, gather_rows, order_pairs
from lightning_fastmoe.ops.permute import permute, unpermute

TOKENS, EXPERTS, WIDTH = 6, 4, 8


def make(name, top_k, dtype):
    """A function of leaves, and the leaves."""
    torch.manual_seed(0)
    order = ops.order_by_expert(torch.randint(EXPERTS, (TOKENS, top_k)), EXPERTS)
    token = torch.div(order.order, top_k, rounding_mode="floor")
    pairs = order_pairs(token, TOKENS)
    rows = torch.randn(TOKENS * top_k, WIDTH, dtype=dtype, requires_grad=True)
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    wide = ops.kernels.accumulation_dtype(dtype)
    weights = torch.rand(TOKENS, top_k, dtype=wide, requires_grad=True)
    by_row = torch.rand(TOKENS * top_k, dtype=wide, requires_grad=True)
    return {
        "permute": (lambda x: permute(x, order.order, order.inverse, top_k), (x,)),
        "unpermute": (lambda y, w: unpermute(y, w, order.order, order.inverse), (rows, weights)),
        "gather_rows": (lambda x: gather_rows(x, pairs), (x,)),
        "combine_rows": (lambda y, w: combine_rows(y, w, pairs), (rows, by_row)),
    }[name]


class SameAgain(TorchFunctionMode):
    """Notes the tensors that a call gave back as they were, as those in place and ``to`` may."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(out is argument for argument in args):
            self.found.append(out)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("name", ["permute", "unpermute", "gather_rows", "combine_rows"])
def test_no_result_is_another_tensor_of_the_function(name, top_k, dtype):
    """With whatever torch: the test below is red with 2.11 alone."""
    function, leaves = make(name, top_k, dtype)
    with SameAgain() as mode:
        out = function(*leaves)
    assert out.grad_fn is not None
    assert not any(out is one for one in mode.found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("name", ["permute", "unpermute", "gather_rows", "combine_rows"])
def test_gradients_are_those_of_the_function(name, top_k, dtype, backend):
    """Torch 2.11 loses them where a function's result is one of its other tensors again."""
    torch._dynamo.reset()
    function, leaves = make(name, top_k, dtype)
    out = function(*leaves)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, leaves, grad)
    found = torch.compile(function, backend=backend, fullgraph=True)(*leaves)
    assert torch.equal(found, out)
    for got, want in zip(torch.autograd.grad(found, leaves, grad), wanted, strict=True):
        assert want.abs().max() > 0
        assert torch.equal(got, want)
