from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.ops import order_by_expert, permute, unpermute

CASES = [(0, 3, 4, 2), (1, 1, 1, 1), (5, 3, 7, 1), (11, 5, 7, 3), (6, 2, 3, 3), (13, 7, 11, 5)]
"""(T, D, E, K)."""


def make(tokens, experts, k, seed=0):
    torch.manual_seed(seed)
    return order_by_expert(torch.randint(0, experts, (tokens, k)), experts)


@pytest.mark.parametrize(("tokens", "width", "experts", "k"), CASES)
def test_permute_equals_index_loops(tokens, width, experts, k):
    order = make(tokens, experts, k)
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    rows = permute(x, order.order, order.inverse, k)
    want = [x[pair // k].tolist() for pair in order.order.tolist()]
    assert rows.tolist() == want
    upstream = torch.randn(tokens * k, width, dtype=torch.float64)
    (dx,) = torch.autograd.grad(rows, x, upstream)
    want_dx = torch.zeros_like(x)
    for row, pair in enumerate(order.order.tolist()):
        want_dx[pair // k] += upstream[row]
    torch.testing.assert_close(dx, want_dx, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("tokens", "width", "experts", "k"), CASES)
def test_unpermute_equals_index_loops(tokens, width, experts, k):
    order = make(tokens, experts, k)
    y = torch.randn(tokens * k, width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, k, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(tokens, width, dtype=torch.float64)
    out = unpermute(y, weights, order.order, order.inverse)
    dy, dw = torch.autograd.grad(out, (y, weights), upstream)
    want, want_dy, want_dw = (torch.zeros_like(t) for t in (out, y, weights))
    with torch.no_grad():
        for row, pair in enumerate(order.order.tolist()):
            t, slot = divmod(pair, k)
            want[t] += weights[t, slot] * y[row]
            want_dy[row] = weights[t, slot] * upstream[t]
            want_dw[t, slot] = y[row] @ upstream[t]
    for got, expected in ((out, want), (dy, want_dy), (dw, want_dw)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("tokens", "width", "experts", "k"), [(3, 2, 4, 1), (4, 3, 5, 2)])
def test_permute_and_unpermute_pass_gradcheck(tokens, width, experts, k):
    order = make(tokens, experts, k)
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens * k, width, dtype=torch.float64, requires_grad=True)
    w = torch.randn(tokens, k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: permute(a, order.order, order.inverse, k), x)
    assert torch.autograd.gradcheck(
        lambda a, b: unpermute(a, b, order.order, order.inverse), (y, w)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_one_side_of_unpermute_needs_a_gradient(frozen):
    order = make(5, 3, 2)
    inputs = [torch.randn(10, 4).double(), torch.randn(5, 2).double()]
    for tensor in inputs:
        tensor.requires_grad_()
    full = torch.autograd.grad(unpermute(*inputs, order.order, order.inverse).sum(), inputs)
    inputs[frozen].requires_grad_(False)
    unpermute(*inputs, order.order, order.inverse).sum().backward()
    assert inputs[frozen].grad is None
    assert torch.equal(inputs[1 - frozen].grad, full[1 - frozen])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_are_accumulated_in_fp32(dtype):
    """One big row and 7 small ones, each of which alone would be rounded away."""
    large = 2 / torch.finfo(dtype).eps  # its unit in the last place is 2
    order = order_by_expert(torch.arange(8).view(1, 8), 8)
    rows = torch.ones(8, 1, dtype=dtype)
    rows[0] = large
    want = torch.tensor([[large + 7.0]]).to(dtype)
    assert want.item() > large
    out = unpermute(rows, torch.ones(1, 8), order.order, order.inverse)
    assert out.dtype == dtype
    assert torch.equal(out, want)
    x = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    (dx,) = torch.autograd.grad(permute(x, order.order, order.inverse, 8), x, rows)
    assert torch.equal(dx, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_are_rounded_once(dtype):
    order = make(200, 8, 8)
    rows, weights = torch.rand(1600, 3).to(dtype), torch.rand(200, 8)
    out = unpermute(rows, weights, order.order, order.inverse).double()
    exact = unpermute(rows.double(), weights.double(), order.order, order.inverse)
    # All terms are positive, so half a unit in the last place is all that rounding may cost.
    assert ((out - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact).all()
    assert not torch.equal(out, exact)


def test_weights_stay_fp32_beside_half_rows():
    order = make(5, 3, 2)
    y = torch.randn(10, 4).bfloat16().requires_grad_()
    w = torch.rand(5, 2, requires_grad=True)
    out = unpermute(y, w, order.order, order.inverse)
    out.float().sum().backward()
    assert (out.dtype, y.grad.dtype, w.grad.dtype) == (torch.bfloat16, y.dtype, torch.float32)
    # d out / d w is the row itself, summed without rounding to bf16 on the way.
    want = y.detach().double().sum(dim=1)[order.inverse].view(5, 2)
    torch.testing.assert_close(w.grad.double(), want, rtol=1e-6, atol=1e-6)


def test_expanded_and_strided_inputs():
    order = make(6, 4, 2)
    x = torch.randn(3, 6, dtype=torch.float64).t().requires_grad_()
    rows = permute(x, order.order, order.inverse, 2)
    assert torch.equal(rows, permute(x.contiguous(), order.order, order.inverse, 2))
    (dx,) = torch.autograd.grad(rows.sum(), x)  # an upstream gradient with strides 0
    assert torch.equal(dx, torch.full_like(dx, 2.0))
    w = torch.rand(2, 6, dtype=torch.float64).t().requires_grad_()
    out = unpermute(rows.detach(), w, order.order, order.inverse)
    torch.testing.assert_close(out, x.detach() * w.sum(dim=1, keepdim=True))
    (dw,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(dw, x.detach().sum(dim=1, keepdim=True).expand(6, 2))
