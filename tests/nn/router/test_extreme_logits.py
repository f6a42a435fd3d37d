"""Every router in fp32 against itself in fp64, for logits far from zero, equal, or far apart.

Weights are ratios of scores: those may be zero in fp32 where these are ordinary numbers.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_fastmoe.nn.router import ROUTERS, LinearRouter, RoutingContext, loss_value
from lightning_fastmoe.nn.router.balanced import balanced_assignment
from lightning_fastmoe.nn.router.interface import Router, unit_vectors
from lightning_fastmoe.nn.router.losses import importance_loss, load_loss
from lightning_fastmoe.ops import reference_routers

E = 6
STEPS = torch.tensor([0.0, 0.5, -1.0, 2.0, -0.25, 1.5])
ROWS = torch.stack(
    [far + STEPS for far in (0.0, -20.0, -90.0, -104.0, -200.0, 20.0, 100.0)]
    + [far + 64 * STEPS for far in (1e4, -1e4)]
    + [torch.full((E,), far) for far in (0.0, -90.0, -200.0, 1e4, -1e4)]
    + [torch.tensor([-150.0, -149.5, 1e4, -151.0, -150.5, -148.0]), 100 * STEPS, 5000 * STEPS]
)
"""(T, E); bf16 and fp16 round them, and what they round to is what both routers see."""

LINEAR = {
    **{n: (n, {}) for n, cls in ROUTERS.items() if issubclass(cls, LinearRouter)},
    "switch": ("switch", {"jitter": 0.0}),  # which rounds the tokens
    "sigmoid, no bias": ("sigmoid", {"balance_bias": False}),
    "sigmoid in groups": ("sigmoid", {"num_groups": 3, "limit_groups": 2}),
    "sigmoid, plain weights": ("sigmoid", {"normalize_weights": False}),
    "softmax, plain weights": ("softmax", {"normalize_weights": False}),
    "softmax, biased": ("softmax", {"balance_bias": True}),
    "softmax after selection": ("softmax", {"balance_bias": True, "score_after_selection": True}),
    "sinkhorn, 2": ("sinkhorn", {"top_k": 2}),
}


def build(name: str) -> Router:
    """A router whose logits are its tokens."""
    kind, options = LINEAR[name]
    router = ROUTERS[kind](E, E, **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        if router.balance_bias is not None and kind == "softmax":
            # Keeps the best experts out: what is chosen has hardly any of the probability.
            router.balance_bias.copy_(torch.tensor([0.0, 0.0, -2.0, -2.0, 0.0, -2.0]))
    return router


def context(**kwargs) -> RoutingContext:
    return RoutingContext(
        training=True, seed=3, first_token=torch.tensor(5), grid=(1, len(ROWS)), **kwargs
    )


def assert_close(got, want, rtol=2e-6, atol=1e-37):
    """Each entry of ``want`` to fp32, or to fp32 of the row's largest where terms cancel."""
    assert got.isfinite().all()
    largest = want.abs().amax(dim=-1, keepdim=True) if want.dim() > 1 else want.abs()
    error = (got.double() - want).abs()
    assert bool((error <= rtol * largest + atol).all()), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_equals_fp64(name, dtype):
    router = build(name)
    twin = copy.deepcopy(router).double()
    x = ROWS.to(dtype).float().requires_grad_()
    wide = x.detach().double().requires_grad_()
    got, want = router(x, context()), twin(wide, context())
    assert torch.equal(got.expert_ids, want.expert_ids)
    assert_close(got.scores, want.scores)
    assert_close(got.weights, want.weights)
    # Each weight by itself: the second of two may be far smaller than the first.
    torch.testing.assert_close(got.weights.double(), want.weights, rtol=1e-5, atol=1e-37)
    torch.manual_seed(0)
    terms = {"weights": torch.randn(want.weights.shape), "scores": torch.randn(want.scores.shape)}
    pairs = [((getattr(r, n) * up).sum() for r in (got, want)) for n, up in terms.items()]
    pairs += [
        (loss_value(loss, r, context()) for r in (got, want))
        for loss in sorted(type(router).losses | {"z_loss"})
    ]
    for a, b in pairs:
        assert_close(a.detach(), b.detach(), rtol=1e-5)
        options = {"retain_graph": True, "allow_unused": True}
        (c,), (d,) = (torch.autograd.grad(t, i, **options) for t, i in ((a, x), (b, wide)))
        assert (c is None) == (d is None)
        if c is not None:
            # Where one score is nearly 1, it times (g - <scores, g>) cancels to the rounding of g.
            assert_close(c, d, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid, no bias", "sigmoid in groups", "gshard"])
def test_the_larger_logit_wins_where_scores_are_equal_in_fp32(name):
    x = torch.tensor([[-203.0, -202.0, -205.0, -201.0, -204.0, -200.0]])
    router = build(name)
    assert router(x).expert_ids.tolist() == [[5, 3]]
    # Sigmoids of 1. A group is as far from 1 as the lower of its best two.
    second = 1 if name == "sigmoid in groups" else 3
    assert router(x + 1200).expert_ids.tolist() == [[5, second]]
    assert router(torch.zeros(1, E)).expert_ids.tolist() == [[0, 1]]


def test_sigmoid_groups_are_told_apart_where_scores_are_zero_in_fp32():
    router = build("sigmoid in groups")
    x = torch.tensor([[-200.0, -200.0, -199.5, -260.0, -199.6, -199.6]])
    # exp(-200 + ...): 2 exp(-.0), exp(.5) + 0, 2 exp(.4): groups 2 and 0, though 1 has the best.
    assert sorted(router(x).expert_ids[0].tolist()) == [4, 5]


@pytest.mark.parametrize("far", [-30.0, -46.0, -58.0])
@pytest.mark.parametrize("equal", [False, True])
def test_noisy_load_of_small_noise(far, equal):
    """Against the formula in fp64, values and gradients; equal logits leave the choice to noise."""
    torch.manual_seed(0)
    clean = torch.zeros(7, 4) if equal else torch.randn(7, 4)
    x = torch.cat([clean, torch.full((7, 1), far)], dim=1)
    router = ROUTERS["noisy"](5, 4, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 5))
        router.noise_weight[:, 4] = torch.tensor([1.0, 1.0, 1.0, 0.99])
    x.requires_grad_()
    got = router(x, RoutingContext(training=True, seed=1, first_token=torch.tensor(0)))
    draws = RoutingContext(seed=1, first_token=torch.tensor(0)).uniform(x.detach(), 4).double()
    z = torch.special.ndtri(draws + 2.0**-25)
    wide = x.detach().double().requires_grad_()
    size = torch.log1p(torch.exp(wide @ router.noise_weight.double().T))
    gates, weights, ids, load = reference_routers.noisy_top_k(
        wide @ router.weight.double().T, size, z, 2
    )
    assert torch.equal(got.expert_ids, ids)
    assert_close(got.weights, weights)
    assert_close(got.load, load, rtol=1e-5)
    upstream = torch.randn(7, 4)
    (a,) = torch.autograd.grad((got.load * upstream).sum(), x)
    (b,) = torch.autograd.grad((load * upstream).sum(), wide)
    assert_close(a, b, rtol=1e-4)


@pytest.mark.parametrize("far", [-70.0, -104.0, -1e4])
def test_noisy_without_any_noise_left(far):
    """softplus is zero; the load says which experts are chosen, ties count half or noise."""
    x = torch.tensor(
        [[3.0, 1.0, 2.0, 0.0, far], [0.0, 0.0, 0.0, 0.0, far], [5.0, 5.0, 1, 5.0, far]]
    )
    router = ROUTERS["noisy"](5, 4, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 5))
        router.noise_weight[:, 4] = 1
    x.requires_grad_()
    got = router(x, RoutingContext(training=True, seed=1, first_token=torch.tensor(0)))
    assert got.load[0].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert got.load[2].tolist() == [0.5, 0.5, 0.0, 0.5]
    assert got.load.isfinite().all()
    grads = torch.autograd.grad(
        got.load.sum() + got.weights.square().sum(), [x, *router.parameters()]
    )
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1.0, 1e15, 1e25])
def test_unit_vectors_of_any_length(scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(4, 5)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    got, want = unit_vectors(x), wide / wide.norm(dim=-1, keepdim=True)
    assert_close(got, want)
    upstream = torch.randn(4, 5)
    (a,) = torch.autograd.grad((got * upstream).sum(), x)
    (b,) = torch.autograd.grad((want * upstream).sum(), wide)
    assert_close(a, b, rtol=1e-5)


def test_unit_vectors_of_zeros_are_zeros():
    x = torch.zeros(2, 3, requires_grad=True)
    unit_vectors(x).sum().backward()
    assert not unit_vectors(x).any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cosine", "soft"])
@pytest.mark.parametrize("scale", [1e-22, 1e22])
def test_routers_by_direction_look_at_no_length(name, scale):
    torch.manual_seed(0)
    router = ROUTERS[name](8, 4)
    x = torch.randn(5, 8)
    want, got = (router(s * x, RoutingContext(grid=(1, 5))) for s in (1.0, scale))
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [1e-30, 1e-22, 1.0, 1e25])
@pytest.mark.parametrize("loss", ["importance", "load"])
def test_cv_squared_of_any_size(loss, value):
    numbers = (value * torch.tensor([[1.0, 2.0, 5.0]])).requires_grad_()
    wide = numbers.detach().double().requires_grad_()
    routing = ROUTERS["softmax"](3, 3, 2)(torch.randn(1, 3))
    field = {"importance": "scores", "load": "load"}[loss]
    of = {"importance": importance_loss, "load": load_loss}[loss]
    got = of(routing._replace(**{field: numbers}))
    want = reference_routers.cv_squared(wide.sum(dim=0))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    (a,), (b,) = torch.autograd.grad(got, numbers), torch.autograd.grad(want, wide)
    assert_close(a, b, rtol=1e-5)


class Listed(Router):
    """Scores of its own making."""

    def route(self, x, context):
        return self.token_choice(x, x, log_scores=context)


def test_token_choice_by_logarithms_or_with_equal_weights():
    router = Listed(3, 3, 2)
    router.add_balance_bias()
    router.balance_bias[0] = -2.0
    x = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.375, 0.125]], requires_grad=True)
    logs = torch.tensor([[0.0, -200.0, -201.0], [0.5, 0.375, 0.125]])
    logs[1].log_()
    plain, exact = router.route(x, None), router.route(x, logs)
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(plain.weights, torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
    torch.testing.assert_close(exact.weights, torch.tensor([[share, 1 - share], [0.75, 0.25]]))
    plain.weights[:, 0].sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0, 0], [0, 0.5, -1.5]]))


def test_expert_choice_orders_tokens_whose_scores_are_zero_in_fp32():
    x = torch.zeros(4, E)
    x[:, 0] = torch.tensor([-203.0, -201.0, -202.0, -200.0])
    got = build("expert_choice")(x, RoutingContext(grid=(1, 4), capacity_factor=3.0))
    assert got.token_ids[got.expert_ids == 0].tolist() == [3, 1]


def test_an_auction_ends_however_fine_its_tolerance():
    torch.manual_seed(0)
    scores = torch.randn(8, 2, dtype=torch.float64)
    owner = balanced_assignment(scores, 1e-30)
    assert torch.bincount(owner).tolist() == [4, 4]
    total = float(scores.gather(1, owner.unsqueeze(1)).sum())
    assert total == pytest.approx(reference_routers.best_assignment(scores), abs=1e-10)
