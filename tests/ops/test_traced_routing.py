"""Routing as operators for torch.compile, against the functions that run without it."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.nn.router.losses import load_balancing_loss, z_loss
from lightning_fastmoe.nn.router.routing import Routing
from lightning_fastmoe.ops import order_by_expert, routing, sigmoid_top_k, softmax_top_k
from lightning_fastmoe.ops import traced_routing as traced
from lightning_fastmoe.ops.native import TRACED_NAMESPACE

OPERATORS = getattr(torch.ops, TRACED_NAMESPACE)
T, E, K = 13, 7, 3
CASES = [(s, n, b) for s in (False, True) for n in (False, True) for b in (False, True)]


def logits_of(tokens: int = T, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(tokens, E, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("sigmoid", "normalize", "biased"), CASES)
@pytest.mark.parametrize("tokens", [T, 0])
def test_scores_choices_and_gradients(sigmoid, normalize, biased, tokens):
    logits = logits_of(tokens)
    bias = torch.randn(E, dtype=torch.float64) if biased else None
    want = (sigmoid_top_k if sigmoid else softmax_top_k)(logits, K, normalize, bias)
    found = traced.score_top_k(logits, bias, K, normalize, sigmoid)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    upstream = [torch.randn_like(t) for t in want[:2]]
    for used in ([0, 1], [0], [1]):
        grads = [
            torch.autograd.grad(
                [result[i] for i in used], logits, [upstream[i] for i in used], retain_graph=True
            )[0]
            for result in (found, want)
        ]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)
        assert not tokens or grads[1].abs().sum() > 0


@pytest.mark.parametrize("tokens", [T, 0])
def test_order(tokens):
    ids = torch.randint(E, (tokens, K), generator=torch.Generator().manual_seed(1))
    want = order_by_expert(ids, E)
    found = routing.ExpertOrder(*traced.order_by_expert(ids.flatten(), E))
    for name in ("order", "inverse", "tokens_per_expert", "offsets"):
        a, b = getattr(found, name), getattr(want, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("of_balancing", "of_z"), [(0.3, 0.2), (0.3, 0.0), (0.0, 0.2)])
def test_balancing_losses(of_balancing, of_z):
    """The sum alone is differentiated in training; a user may differentiate each loss."""
    logits = logits_of()
    scores, weights, ids = softmax_top_k(logits, K, True)
    counts = ids.flatten().bincount(minlength=E)
    given = Routing(logits, scores, weights, ids, tokens_per_expert=counts)
    right = [
        load_balancing_loss(given) if of_balancing else torch.zeros_like(logits.sum()),
        z_loss(given) if of_z else torch.zeros_like(logits.sum()),
    ]
    values, share = traced.balancing_losses(scores, logits, counts, of_balancing, of_z)
    torch.testing.assert_close(share, counts / (T * K), check_dtype=False)
    total = of_balancing * right[0] + of_z * right[1]
    for found, want in zip(values.unbind(), [*right, total], strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)
        if want.requires_grad:
            grads = [
                torch.autograd.grad(x, logits, torch.full_like(x, 1.7), retain_graph=True)[0]
                for x in (found, want)
            ]
            torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)
            assert grads[1].abs().sum() > 0


@pytest.mark.poisoned(False)  # opcheck traces with fake tensors
def test_operators_are_what_they_declare():
    for dtype in (torch.float32, torch.float64):
        logits = logits_of(dtype=dtype)
        bias = torch.randn(E, dtype=dtype)
        scores, weights, ids = (t.detach() for t in softmax_top_k(logits, K, True, bias))
        check = torch.library.opcheck
        for given in (None, bias):
            check(OPERATORS.score_top_k.default, (logits, given, K, True, False))
        plain = logits.detach()
        for grads in ((scores, weights), (None, weights), (scores, None)):
            arguments = (plain, weights, ids, *grads, True, True)
            check(OPERATORS.score_top_k_backward.default, arguments)
        for whole in (torch.int64, torch.int32):
            check(OPERATORS.order_by_expert.default, (ids.flatten().to(whole), E))
        counts = ids.flatten().bincount(minlength=E)
        leaves = scores.requires_grad_(), logits
        check(OPERATORS.balancing_losses.default, (*leaves, counts, 0.3, 0.2))
        share = counts / counts.sum()
        given = torch.ones(3, dtype=dtype), plain, share.to(dtype), 0.3, 0.2
        check(OPERATORS.balancing_losses_backward.default, given)
        check(OPERATORS.balancing_losses_backward.default, (*given[:-1], 0.0))


@pytest.mark.parametrize(
    ("experts", "k", "dtype"), [(1025, 2, "float32"), (40, 33, "float32"), (7, 2, "bfloat16")]
)
def test_kernels_are_not_given_what_they_refuse(experts, k, dtype, monkeypatch):
    """Each operator looks at the limits itself, as there is one call for each direction."""

    def refused(*tensors):
        raise AssertionError("asked for kernels")

    monkeypatch.setattr(routing, "native", refused)
    logits = torch.randn(5, experts, dtype=getattr(torch, dtype))
    weights, ids = torch.rand(5, k, dtype=logits.dtype), torch.arange(k).expand(5, k)
    grad = traced.score_top_k_backward(logits, weights, ids, None, weights, True, False)
    assert grad.shape == logits.shape
    assert grad.isfinite().all()


def test_kernels_are_not_given_losses_that_they_refuse(monkeypatch):
    monkeypatch.setattr(traced, "native", lambda *_: object())  # has no kernels
    logits = torch.randn(5, 1025)
    scores, counts = logits.softmax(1), torch.ones(1025, dtype=torch.int64)
    values, share = traced.balancing_losses(scores, logits, counts, 0.3, 0.2)
    torch.testing.assert_close(values[1], logits.logsumexp(1).square().mean())
    given = torch.ones(3), logits, share, 0.3, 0.0
    d_scores, d_logits = traced.balancing_losses_backward(*given)
    assert d_scores.abs().sum() > 0
    assert d_logits.shape == (0, 1025)
