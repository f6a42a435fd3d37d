"""What holds for every router: fp32, ties, no tokens, refusals, the protocol."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.nn import (
    CausalityWarning,
    LocalDispatcher,
    MoE,
    Router,
    Routing,
    SequentialSchedule,
    SoftmaxTopKRouter,
)
from lightning_fastmoe.nn.collect import warn_about_causality
from lightning_fastmoe.nn.router import ROUTERS, RoutingContext

D, E = 8, 4
CHOOSING = [n for n in ROUTERS if n not in ("expert_choice", "soft", "hash", "base")]
"""Routers whose experts are the K best by some score."""


def context(tokens, training=True):
    return RoutingContext(
        training=training,
        grid=(1, tokens),
        token_ids=torch.arange(tokens),
        capacity_factor=2.0,
        seed=3,
        first_token=torch.tensor(0),
    )


def tensors(routing):
    return [t for t in routing if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_is_fp32_also_under_autocast(name, dtype):
    torch.manual_seed(0)
    router, x = ROUTERS[name](D, E).to(dtype), torch.randn(9, D).to(dtype)
    got = router(x, context(9))
    exact = copy.deepcopy(router).float()(x.float(), context(9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x, context(9))
    assert len(tensors(got)) >= 4
    for a, b, c in zip(tensors(got), tensors(under_autocast), tensors(exact), strict=True):
        assert a.dtype in (torch.float32, torch.int64, torch.bool)
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", ["gshard", "noisy", "switch"])
def test_random_numbers_are_fp32_for_tokens_in_bf16(name, monkeypatch):
    drawn = []
    uniform = RoutingContext.uniform

    def recorded(*args, **kwargs):
        drawn.append(uniform(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(RoutingContext, "uniform", recorded)
    ROUTERS[name](D, E).bfloat16()(torch.randn(9, D).bfloat16(), context(9))
    assert [u.dtype for u in drawn] == [torch.float32]


class Rounded(SoftmaxTopKRouter):
    """A router from outside that computes with tokens before their product."""

    def route(self, x, routing_context):
        return super().route(x * 1.001, routing_context)


class Shifted(SoftmaxTopKRouter):
    """One with a product of its own."""

    def logits(self, x):
        return x @ self.weight.to(x.dtype).T * 1.001


@pytest.mark.parametrize("kind", [Rounded, Shifted])
def test_a_router_that_does_more_with_tokens_gets_them_in_fp32(kind):
    router, x = kind(D, E), torch.randn(300, D).bfloat16()
    got, exact = router(x, context(300)), router(x.float(), context(300))
    for a, b in zip(tensors(got), tensors(exact), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [False, True])
def test_scores_are_distributions_and_ids_are_experts(name, training):
    torch.manual_seed(0)
    got = ROUTERS[name](D, E)(torch.randn(9, D), context(9, training))
    assert got.logits.shape == got.scores.shape == (9, E)
    torch.testing.assert_close(got.scores.sum(dim=1), torch.ones(9))
    assert bool((got.scores >= 0).all())
    assert got.expert_ids.shape == got.weights.shape
    assert got.expert_ids.dtype == torch.int64
    assert 0 <= int(got.expert_ids.min()) <= int(got.expert_ids.max()) < E


@pytest.mark.parametrize("name", CHOOSING)
def test_ties_go_to_the_lower_expert_id(name):
    router = ROUTERS[name](D, E)
    for parameter in router.parameters():
        nn.init.zeros_(parameter)
    k = router.top_k
    got = router(torch.randn(3, D), context(3, training=False))
    assert got.expert_ids.tolist() == [list(range(k))] * 3


def test_ties_of_expert_choice_go_to_the_earlier_token():
    router = ROUTERS["expert_choice"](D, E)
    nn.init.zeros_(router.weight)
    got = router(torch.randn(8, D), context(8))
    assert got.token_ids.view(E, -1).tolist() == [[0, 1, 2, 3]] * E


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [False, True])
def test_without_tokens_every_router_gives_zero_losses_and_gradients(name, training):
    layer = MoE(D, 8, E, router=name).train(training)
    x = torch.zeros(0, D, requires_grad=True)
    y = layer(x, token_ids=torch.zeros(0, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, D)
    for parameter in layer.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert all(float(value) == 0 for value in layer.last_losses.values())


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_learns_something_and_gives_the_same_bits_twice(name):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = MoE(D, 8, E, router=name)
        x = torch.randn(2, 6, D, requires_grad=True)
        y = layer(x, token_ids=torch.arange(12).view(2, 6))
        y.square().mean().backward()
        grads = {n: p.grad for n, p in layer.named_parameters()}
        found.append([y, x.grad, *grads.values()])
        for parameter, grad in grads.items():
            assert grad.isfinite().all()
            assert grad.any(), parameter
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("softmax", {"top_k": 5}, r"top_k=5 is out of range.*num_experts=4"),
        ("softmax", {"top_k": True}, r"top_k=True \(bool\) is invalid"),
        ("softmax", {"top_k": 1, "score_after_selection": True}, "always 1"),
        ("softmax", {"score_after_selection": True, "normalize_weights": False}, "normalised"),
        ("noisy", {"top_k": 1}, "top_k=1 is invalid.*at least 2"),
        ("noisy", {"noise": -1.0}, "noise=-1.0 is invalid"),
        ("switch", {"top_k": 2}, "top_k=2 doesn't fit Switch routing"),
        ("switch", {"jitter": 1.0}, r"jitter=1.0 is out of range.*\[0, 1\)"),
        ("gshard", {"top_k": 1}, "top_k=1 doesn't fit GShard"),
        ("sigmoid", {"num_groups": 3}, "num_groups=3 does not divide num_experts=4"),
        ("sigmoid", {"num_groups": 4, "limit_groups": 1}, r"limit_groups=1.*top_k=2"),
        ("sigmoid", {"num_groups": 2, "limit_groups": 3}, r"limit_groups=3.*\[1, 2\]"),
        ("sigmoid", {"top_k": 1, "normalize_weights": True}, "no gradient"),
        ("cosine", {"d_router": 0}, "d_router=0 is invalid"),
        ("cosine", {"temperature": 0.0}, "temperature=0.0 is invalid"),
        ("expert_choice", {"over": "batch"}, "over='batch' is unknown"),
        ("soft", {"slots_per_expert": 0}, "slots_per_expert=0 is invalid"),
        ("base", {"top_k": 2}, "top_k=2 doesn't fit BASE"),
        ("base", {"tolerance": 0.0}, "tolerance=0.0 is invalid"),
        ("sinkhorn", {"iterations": 0}, "iterations=0 is invalid"),
        ("swipe", {"num_groups": 3}, "num_groups=3 does not divide"),
        ("topology", {"outgoing_fraction": 1.5}, "outgoing_fraction=1.5 is out of range"),
    ],
)
def test_refused_options(name, arguments, message):
    top_k = arguments.pop("top_k", None)
    options = {k: v for k, v in arguments.items() if k != "normalize_weights"}
    normalize = arguments.get("normalize_weights")
    with pytest.raises(ConfigError, match=message):
        MoE(D, 8, E, top_k, router=name, router_options=options, normalize_weights=normalize)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"router_options": {"jiter": 0.1}, "router": "switch"}, "has no option jiter.*jitter"),
        ({"router": "expert_choice", "top_k": 2}, "has no option top_k.*over"),
        ({"router": "hash", "normalize_weights": True}, "has no option normalize_weights"),
        ({"router": SoftmaxTopKRouter(D, E), "router_options": {"a": 1}}, "router_options="),
        ({"router": SoftmaxTopKRouter(D, E), "top_k": 3}, "layer's top_k=3.*top_k=2"),
        ({"router": SoftmaxTopKRouter(D, 3)}, "among 3 experts.*num_experts=4"),
        ({"router": "no.such.Router"}, "router='no.such.Router' is unknown"),
        ({"router": "torch.nn.NoSuchRouter"}, "unknown"),
        ({"router": lambda d, e: "nothing"}, "gave a str"),
        ({"router": 3}, "neither a name"),
        ({"router": "expert_choice", "load_balancing": 0.1}, "not apply to ExpertChoiceRouter"),
        ({"router": "soft", "z_loss": 0.1}, "does not apply to SoftRouter.*none"),
        ({"load": 0.1}, "load=0.1.*does not apply to SoftmaxTopKRouter"),
        ({"z_loss": True}, r"z_loss=True \(bool\) is invalid"),
        ({"z_loss": "high"}, r"z_loss='high' \(str\) is invalid"),
        ({"router": "torch.nn.NoSuchRouter"}, "has no attribute 'NoSuchRouter'"),
        ({"router": "torch.pi"}, "router='torch.pi' is a float"),
        ({"router": "base", "router_options": {"over": "world"}}, "over='world' is unknown"),
        ({"router": "sinkhorn", "router_options": {"over": "all"}}, "over='all' is unknown"),
    ],
)
def test_refused_combinations(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        MoE(D, 8, E, **kwargs)


class Nearest(Router):
    """The ten lines of the docs."""

    def __init__(self, d_model, num_experts, top_k=2):
        super().__init__(d_model, num_experts, top_k)
        self.centres = nn.Parameter(torch.randn(num_experts, d_model))

    def route(self, x, context):
        logits = -torch.cdist(x, self.centres.to(x.dtype))
        return self.token_choice(logits, torch.softmax(logits, dim=-1))


class Plain(nn.Module):
    """Knows nothing of this package but what it returns."""

    def __init__(self, d_model, num_experts):
        super().__init__()
        self.gate = nn.Linear(d_model, num_experts)

    def forward(self, x):
        logits = self.gate(x)
        weights, ids = logits.softmax(-1).max(dim=-1, keepdim=True)
        return Routing(logits, logits.softmax(-1), weights, ids)


@pytest.mark.parametrize(
    "router", [Nearest, "nn.router.test_common.Nearest", Plain, lambda d, e: Nearest(d, e, 3)]
)
def test_a_router_of_ones_own(router):
    torch.manual_seed(0)
    layer = MoE(D, 8, E, router=router, capacity_factor=1.0)
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    layer(torch.randn(3, 5, D)).sum().backward()
    assert layer.last_losses.keys() == {"load_balancing", "z_loss"}
    assert all(p.grad is not None for p in layer.parameters())
    assert int(seen[0].dropped_counts().sum()) > 0


@pytest.mark.parametrize("name", ROUTERS)
def test_what_is_not_causal_warns_in_an_autoregressive_model(name, recwarn):
    MoE(D, 8, E, router=name, autoregressive=True)
    model = nn.Sequential(nn.Identity(), MoE(D, 8, E, router=name))
    warn_about_causality(model)
    assert len(recwarn) == (not ROUTERS[name].causal)
    model.autoregressive = True
    warn_about_causality(nn.ModuleList([model]))
    assert len(recwarn) == 2 * (not ROUTERS[name].causal)
    for warning in recwarn:
        assert warning.category is CausalityWarning
        assert "is not causal" in str(warning.message)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in ROUTERS
        if ROUTERS[n].causal and n not in ("base", "sinkhorn", "swipe", "topology", "gshard", "dc")
    ],
)
def test_causal_routers_treat_each_token_alone(name):
    """In training too, randomness included: a token's choice follows from it and its number."""
    torch.manual_seed(0)
    router, x = ROUTERS[name](D, E).double(), torch.randn(9, D, dtype=torch.float64)
    whole, part = router(x, context(9)), router(x[:5], context(5))
    assert torch.equal(whole.expert_ids[:5], part.expert_ids)
    torch.testing.assert_close(whole.weights[:5], part.weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_state_dict_holds_what_a_resumed_run_needs(name):
    layer = MoE(D, 8, E, router=name)
    buffers = {n for n, _ in layer.router.named_buffers()} & layer.router.state_dict().keys()
    want = (
        {"tokens_seen"}
        if ROUTERS[name].random
        else {"balance_bias"}
        if name == "sigmoid"
        else set()
    )
    assert buffers == want


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_in_bf16(name, chain, autocast):
    """Against the layer in fp64 with the same (rounded) weights and the same choice."""
    torch.manual_seed(0)
    layer = MoE(16, 32, E, router=name).bfloat16()
    x = torch.randn(24, 16).bfloat16()
    ids = torch.arange(24)
    exact = copy.deepcopy(layer).double()
    for wide, narrow in zip(exact.parameters(), layer.parameters(), strict=True):
        wide.data.copy_(narrow)
    if chain:
        layer.schedule = SequentialSchedule(LocalDispatcher(E))
    if autocast:
        layer.float()
    leaf = x.float().requires_grad_() if autocast else x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = layer(leaf, token_ids=ids)
    high = x.double().requires_grad_()
    want = exact(high, token_ids=ids)
    assert got.dtype == leaf.dtype
    upstream = torch.randn(24, 16).to(got.dtype)
    got_grads = torch.autograd.grad(got, [leaf, *layer.parameters()], upstream)
    want_grads = torch.autograd.grad(want, [high, *exact.parameters()], upstream.double())
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: tuple(r), "returned a tuple. It must return a Routing"),
        (lambda r: r._replace(logits=r.logits[:, :3]), r"logits = \(6, 3\); it must be \(6, 4\)"),
        (lambda r: r._replace(scores=r.scores[:5]), r"scores = \(5, 4\)"),
        (lambda r: r._replace(weights=r.weights[:, :1]), r"weights = \(6, 1\).*\(6, 2\)"),
        (lambda r: r._replace(expert_ids=r.expert_ids.int()), "dtype of expert_ids = torch.int32"),
        (lambda r: r._replace(expert_ids=r.expert_ids + 3), r"expert_ids from 3 to .*\[0, 4\)"),
        (lambda r: r._replace(expert_ids=r.expert_ids - 1), r"expert_ids from -1 to"),
        (
            lambda r: r._replace(expert_ids=r.expert_ids[:4], weights=r.weights[:4]),
            "rows of expert_ids = 4; it must be 6",
        ),
        (
            lambda r: r._replace(
                expert_ids=r.expert_ids[:, 0],
                weights=r.weights[:, 0],
                token_ids=torch.arange(6) + 1,
            ),
            r"token_ids from 1 to 6; they must be in \[0, 6\)",
        ),
    ],
)
def test_what_a_router_of_ones_own_must_not_return(change, message):
    class Wrong(nn.Module):
        def forward(self, x):
            return change(SoftmaxTopKRouter(D, E, 2)(x))

    torch.manual_seed(0)
    with pytest.raises(ShapeError, match=message):
        MoE(D, 8, E, router=Wrong())(torch.randn(6, D))
