"""Rows of pairs, summed by the caller: the bits of the layer that sums them itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.ops import kernels

D, F, E, T = 16, 32, 6, 23


def make(dtype: torch.dtype, top_k: int, biased: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Tokens, weights and stacks; experts; the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    wide = kernels.accumulation_dtype(dtype)
    ids = torch.randint(E - 1, (T, top_k), generator=generator)  # the last has none
    weights = torch.rand(T, top_k, generator=generator).to(wide)
    leaves = [draw(T, D), weights, draw(E, 2 * F, D), draw(E, D, F)]
    if biased:
        leaves += [draw(E, 2 * F), draw(E, D)]
    return [leaf.requires_grad_() for leaf in leaves], ids, draw(T, D)


class LikeARankOfItsOwn(torch.autograd.Function):
    """Sums rows that a layer has left alone; their gradient is the sum's."""

    @staticmethod
    def forward(ctx, y, weights, order, dtype):
        ctx.order, ctx.slots, ctx.dtype = order, weights.shape[1], y.dtype
        return kernels.sum_rows(y, order.inverse, weights, ctx.slots).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.order.order // ctx.slots].to(ctx.dtype), None, None, None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_layer(dtype, top_k, biased, fused):
    leaves, ids, upstream = make(dtype, top_k, biased)
    x, weights, up, down, *biases = leaves
    order = ops.order_by_expert(ids, E)
    layer = ops.expert_layer if fused else ops.unfused_layer
    right = layer(x, weights, order, up, down, "swiglu", *biases)
    right_grads = torch.autograd.grad(right, leaves, upstream)
    token = order.order // top_k
    rows = x.detach()[token].requires_grad_()
    by_row = weights.detach().reshape(-1)[order.order].unsqueeze(1).requires_grad_()
    y = layer(rows, by_row, ops.PairRows.of(order), up, down, "swiglu", *biases)
    assert y.dtype == (weights.dtype if biased and fused else dtype)
    found = LikeARankOfItsOwn.apply(y, weights.detach(), order, dtype)
    assert torch.equal(found, right)
    wanted = [rows, by_row, *leaves[2:]]
    for _ in range(2):  # the second time H is spent
        d_rows, d_weights, *grads = torch.autograd.grad(found, wanted, upstream, retain_graph=True)
        assert torch.equal(kernels.sum_rows(d_rows, order.inverse, None, top_k), right_grads[0])
        d_weights = d_weights[order.inverse].view_as(weights)
        if biased and fused:  # a product over all tokens or over all pairs
            torch.testing.assert_close(d_weights, right_grads[1], rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(d_weights, right_grads[1])
        for gradient, expected in zip(grads, right_grads[2:], strict=True):
            torch.testing.assert_close(gradient, expected)


def test_only_what_is_wanted_gets_gradients():
    (x, weights, up, down), ids, _ = make(torch.float32, 2, False)
    order = ops.order_by_expert(ids, E)
    rows, by_row = x.detach()[order.order // 2], weights.detach().reshape(-1)[order.order]
    up.requires_grad_(False)
    y = ops.expert_layer(rows, by_row.unsqueeze(1), ops.PairRows.of(order), up, down, "swiglu")
    y.sum().backward()
    assert up.grad is None
    assert down.grad is not None
    with torch.no_grad():
        again = ops.expert_layer(
            rows, by_row.unsqueeze(1), ops.PairRows.of(order), up, down, "swiglu"
        )
    assert torch.equal(again, y)


def test_many_slots_are_summed_in_their_order():
    """As a kernel does; Tensor.sum() adds up parts of 16."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=generator)
    weights = torch.rand(1, 40, generator=generator)
    for given in (weights, None):
        total = torch.zeros(8)
        for slot in range(40):
            total = total + rows[slot] * (1.0 if given is None else given[0, slot])
        assert torch.equal(kernels.sum_rows(rows, torch.arange(40), given, 40)[0], total)
