"""Routing in one step, and the explicit gradient that its kernel is tested against."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.ops import reference, sigmoid_top_k, softmax_top_k
from lightning_fastmoe.ops.routing import score_top_k_backward


@pytest.mark.parametrize("size", [(5, 7, 2), (3, 4, 4), (6, 3, 1), (0, 4, 2)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_reference(size, normalize):
    tokens, experts, k = size
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    got = softmax_top_k(logits, k, normalize)
    torch.testing.assert_close(got, reference.softmax_top_k(logits, k, normalize))


@pytest.mark.parametrize("size", [(5, 7, 2), (3, 4, 4), (6, 3, 1), (0, 4, 2)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_equals_reference(size, normalize, biased):
    tokens, experts, k = size
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    bias = torch.randn(experts, dtype=torch.float64) if biased else None
    got = sigmoid_top_k(logits, k, normalize, bias)
    torch.testing.assert_close(got, reference.sigmoid_top_k(logits, k, normalize, bias))


def test_the_selection_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    _, weights, ids = sigmoid_top_k(logits, 2, False, torch.tensor([-1.0, 0.0, 0.0]))
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[1.0, 0.0]])))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("function", [softmax_top_k, sigmoid_top_k])
def test_backward_equals_autograd(function, given, normalize):
    torch.manual_seed(0)
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    scores, weights, expert_ids = function(logits, 3, normalize)
    outputs = [out for out, wanted in zip((scores, weights), given, strict=True) if wanted]
    grads = [torch.randn_like(out) for out in outputs]
    (want,) = torch.autograd.grad(outputs, logits, grads)
    left = iter(grads)
    d_scores, d_weights = (next(left) if wanted else None for wanted in given)
    sigmoid = function is sigmoid_top_k
    saved = (logits.detach(), weights.detach(), expert_ids)
    got = score_top_k_backward(*saved, d_scores, d_weights, normalize, sigmoid)
    torch.testing.assert_close(got, want)


def test_no_gradient_gives_none():
    logits = torch.rand(2, 3)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    assert score_top_k_backward(logits, torch.ones(2, 1), ids, None, None, True) is None


@pytest.mark.parametrize("biased", [False, True])
def test_a_row_of_nan_gives_distinct_experts(biased):
    logits = torch.arange(6.0).flip(0).repeat(3, 1)
    logits[1, 4] = torch.nan
    logits[2] = torch.inf
    bias = torch.zeros(6) if biased else None
    expert_ids = softmax_top_k(logits, 4, True, bias)[2]
    assert expert_ids[1:].tolist() == [[4, 0, 1, 2], [0, 1, 2, 3]]
