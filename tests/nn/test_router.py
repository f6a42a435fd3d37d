from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, Routing, SoftmaxTopKRouter
from lightning_fastmoe.nn.router import load_balancing_loss, z_loss
from lightning_fastmoe.ops import reference

CASES = [(1, 1, 1), (7, 5, 1), (11, 7, 3), (6, 4, 4), (0, 3, 2)]
"""(T, E, K)."""


def make(tokens, experts, k, normalize=None):
    torch.manual_seed(0)
    router = SoftmaxTopKRouter(5, experts, k, normalize).double()
    return router, torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "normalize"),
    [(*case, normalize) for case in CASES for normalize in (False, True) if case[2] > normalize],
)
def test_equals_reference(tokens, experts, k, normalize):
    router, x = make(tokens, experts, k, normalize)
    got = router(x)
    logits = x @ router.weight.T
    scores, weights, ids = reference.softmax_top_k(logits, k, normalize)
    assert torch.equal(got.expert_ids, ids)
    leaves = (x, router.weight)
    for a, b in zip(got[:3], (logits, scores, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        upstream = torch.randn_like(a)
        got_grads = torch.autograd.grad(a, leaves, upstream, retain_graph=True)
        want_grads = torch.autograd.grad(b, leaves, upstream, retain_graph=True)
        for c, d in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(c, d, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_are_normalised_by_default_for_more_than_one_expert(k):
    router, x = make(7, 5, k)
    total = router(x).weights.sum(dim=1)
    if k == 1:
        assert (total < 0.99).all()
    else:
        torch.testing.assert_close(total, torch.ones_like(total))


def test_weights_can_be_left_unnormalised():
    router, x = make(7, 5, 2, normalize=False)
    assert (router(x).weights.sum(dim=1) < 0.99).all()


def test_top_1_gives_the_router_a_gradient():
    torch.manual_seed(0)
    layer = MoE(4, 8, 3, top_k=1, load_balancing=0, z_loss=0)
    layer(torch.randn(5, 4)).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("build", [SoftmaxTopKRouter, lambda d, e, **kw: MoE(d, 8, e, **kw)])
def test_top_1_with_normalised_weights_is_refused(build):
    with pytest.raises(ConfigError, match="normalize_weights=True with top_k=1.*no gradient"):
        build(4, 3, top_k=1, normalize_weights=True)


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ConfigError, match=rf"top_k={top_k} is out of range.*num_experts=3"):
        MoE(4, 8, 3, top_k=top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_but_the_input_is_fp32(dtype):
    torch.manual_seed(0)
    router, x = SoftmaxTopKRouter(8, 5).to(dtype), torch.randn(7, 8).to(dtype)
    got = router(x)
    assert {t.dtype for t in got[:3]} == {torch.float32}
    assert torch.equal(got.logits, F.linear(x.float(), router.weight.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x)
    for a, b in zip(got[:4], under_autocast[:4], strict=True):
        assert torch.equal(a, b)


def test_initial_weights():
    torch.manual_seed(0)
    weight = SoftmaxTopKRouter(100, 64).weight
    assert 0.099 < weight.abs().max() <= 0.1  # U(-b, b) with b = 1 / sqrt(100)
    weight = SoftmaxTopKRouter(100, 64, init_std=0.5).weight
    assert weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert weight.abs().max() > 1


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES[:-1])
def test_losses_equal_reference(tokens, experts, k):
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    scores, weights, ids = reference.softmax_top_k(logits, k, normalize=False)
    routing = Routing(logits, scores, weights, ids)
    for got, want in (
        (load_balancing_loss(routing), reference.load_balancing_loss(scores, ids)),
        (z_loss(routing), reference.z_loss(logits)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        (a,) = torch.autograd.grad(got, logits, retain_graph=True)
        (b,) = torch.autograd.grad(want, logits, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_losses_of_no_tokens_are_zero():
    router, x = make(0, 3, 2)
    routing = router(x)
    assert load_balancing_loss(routing).item() == 0
    assert z_loss(routing).item() == 0
