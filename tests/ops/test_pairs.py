"""Rows of tokens that have any number of them."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe import ops

CASES = [([2, 0, 2, 1], 4), ([], 3), ([0, 0, 0], 1), ([4, 3, 4, 0, 4, 3], 6), ([], 0)]


def make(token, tokens, dtype=torch.float64):
    torch.manual_seed(0)
    pairs = ops.order_pairs(torch.tensor(token, dtype=torch.int64), tokens)
    x = torch.randn(tokens, 3).to(dtype).requires_grad_()
    y = torch.randn(len(token), 3).to(dtype).requires_grad_()
    w = torch.rand(len(token), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return pairs, x, y, w.requires_grad_()


def test_pairs_are_ordered_by_token_worked_by_hand():
    pairs = ops.order_pairs(torch.tensor([2, 0, 2, 1]), 4)
    assert pairs.by_token.tolist() == [1, 3, 0, 2]
    assert pairs.lengths.tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize(("token", "tokens"), CASES)
def test_equals_loops(token, tokens):
    pairs, x, y, w = make(token, tokens)
    assert torch.equal(ops.gather_rows(x, pairs), x[token] if token else x[:0])
    want = torch.zeros(tokens, 3, dtype=torch.float64)
    for i, t in enumerate(token):
        want[t] += w[i] * y[i]
    torch.testing.assert_close(ops.combine_rows(y, w, pairs), want)


@pytest.mark.parametrize(("token", "tokens"), [c for c in CASES if c[1]])
def test_gather_and_combine_pass_gradcheck(token, tokens):
    pairs, x, y, w = make(token, tokens)
    assert torch.autograd.gradcheck(lambda x: ops.gather_rows(x, pairs), x)
    assert torch.autograd.gradcheck(lambda y, w: ops.combine_rows(y, w, pairs), (y, w))
    if token:
        assert torch.autograd.gradgradcheck(lambda y, w: ops.combine_rows(y, w, pairs), (y, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_sum_in_fp32(dtype):
    token = [0] * 300
    pairs, x, _, _ = make(token, 1, dtype)
    y = torch.full((300, 3), 1.001, dtype=dtype)
    w = torch.full((300,), 1.0)
    got = ops.combine_rows(y, w, pairs)
    assert got.dtype == dtype
    torch.testing.assert_close(got, (y.double().sum(0, keepdim=True)).to(dtype))
    (grad,) = torch.autograd.grad(ops.gather_rows(x, pairs), x, torch.full_like(y, 1.001))
    torch.testing.assert_close(grad, y.double().sum(0, keepdim=True).to(dtype))
