"""The losses against their formulas, how they act, and what they are invariant under."""

from __future__ import annotations

import pytest
import torch
from nn.thread_ranks import on_ranks

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, Routing, moe_losses
from lightning_fastmoe.nn.router import (
    ROUTERS,
    GShardRouter,
    RoutingContext,
    global_load_balancing_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    loss_value,
    sequence_load_balancing_loss,
    z_loss,
)
from lightning_fastmoe.nn.router.losses import LOSSES
from lightning_fastmoe.ops import reference, reference_routers

E = 5


def route(tokens, k=2, seed=0, skew=0.0):
    torch.manual_seed(seed)
    logits = torch.randn(tokens, E, dtype=torch.float64)
    logits[:, 0] += skew
    logits.requires_grad_()
    scores, weights, ids = reference.softmax_top_k(logits, k, normalize=False)
    return logits, Routing(logits, scores, weights, ids)


def assert_same(got, want, leaf, rtol=1e-11):
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-13)
    (a,) = torch.autograd.grad(got, leaf, retain_graph=True)
    (b,) = torch.autograd.grad(want, leaf, retain_graph=True)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert a.any()


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (7, 2), (12, 5)])
def test_importance_and_load(tokens, k):
    logits, routing = route(tokens, k)
    want = reference_routers.cv_squared(routing.scores.sum(dim=0))
    assert_same(importance_loss(routing), want, logits)
    noisy = routing._replace(load=torch.sigmoid(logits))
    assert_same(load_loss(noisy), reference_routers.cv_squared(noisy.load.sum(dim=0)), logits)
    assert load_loss(routing).item() == 0


def test_slots_that_are_not_used_do_not_count_but_dropped_ones_do():
    logits, routing = route(9)
    active = torch.rand(9, 2) < 0.6
    got = load_balancing_loss(routing._replace(active=active))
    counts = torch.bincount(routing.expert_ids[active], minlength=E).double()
    want = E * (counts / counts.sum() * routing.scores.mean(dim=0)).sum()
    assert_same(got, want, logits)
    kept = active & (torch.rand(9, 2) < 0.5)
    assert load_balancing_loss(routing._replace(active=active, kept=kept)) == got


def test_gshard_balances_first_choices():
    """The paper's c_e: second choices, used or not, are no part of the three losses."""
    torch.manual_seed(0)
    router = GShardRouter(4, E).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    context = RoutingContext(training=True, grid=(3, 4))
    routing = router(x, context)
    assert routing.active is not None
    first, scores = routing.expert_ids[:, :1], routing.scores
    want = reference.load_balancing_loss(scores, first)
    assert_same(load_balancing_loss(routing), want, router.weight)
    assert_same(global_load_balancing_loss(routing, context), want, router.weight)
    want = reference.sequence_load_balancing_loss(scores, first, [4, 4, 4])
    assert_same(sequence_load_balancing_loss(routing, context), want, router.weight)
    both = load_balancing_loss(routing._replace(balanced_slots=None))
    assert abs(float(both - load_balancing_loss(routing))) > 1e-3
    assert int(routing.routed_counts().sum()) == int(routing.active.sum())  # loads count both


def test_an_expert_chosen_twice_counts_twice():
    _, routing = route(4)
    twice = routing._replace(expert_ids=torch.tensor([[0, 0], [1, 1], [0, 1], [2, 2]]))
    want = reference.load_balancing_loss(twice.scores, twice.expert_ids)
    torch.testing.assert_close(load_balancing_loss(twice), want)
    context = RoutingContext(grid=(1, 4))
    torch.testing.assert_close(sequence_load_balancing_loss(twice, context), want)


@pytest.mark.parametrize("grid", [(1, 12), (3, 4), (12, 1), (2, 6)])
def test_sequence_loss(grid):
    logits, routing = route(12)
    got = sequence_load_balancing_loss(routing, RoutingContext(grid=grid))
    want = reference.sequence_load_balancing_loss(
        routing.scores, routing.expert_ids, [grid[1]] * grid[0]
    )
    assert_same(got, want, logits)
    if grid[0] > 1:
        assert abs(float(got - load_balancing_loss(routing))) > 1e-3


def test_sequence_loss_of_what_a_mask_left():
    logits, routing = route(6)
    positions = torch.tensor([0, 2, 3, 8, 10, 11])  # of 4 sequences of 4: 3, 0, 2 + 1... tokens
    got = sequence_load_balancing_loss(routing, RoutingContext(grid=(4, 4), positions=positions))
    want = reference.sequence_load_balancing_loss(routing.scores, routing.expert_ids, [3, 0, 3, 0])
    assert_same(got, want, logits)


def test_sequence_loss_of_packed_documents():
    logits, routing = route(12)
    ids = torch.tensor([0, 0, 0, 0, 0, 2, 3, 3, 5, 5, 5, 5])  # 1 and 4 were masked altogether
    got = sequence_load_balancing_loss(routing, RoutingContext(grid=(2, 8), sequence_ids=ids))
    lengths = [5, 1, 2, 4]
    want = reference.sequence_load_balancing_loss(routing.scores, routing.expert_ids, lengths)
    assert_same(got, want, logits)


@pytest.mark.parametrize("sizes", [(6, 6), (3, 9), (4, 0, 8), (12,)])
def test_global_loss_is_the_loss_of_all_tokens(sizes):
    """The mean over ranks of the terms, and of their gradients, also for uneven ranks."""
    logits, routing = route(12, skew=1.0)
    want = reference.load_balancing_loss(routing.scores, routing.expert_ids)
    parts = [Routing(*(t.split(sizes)[i] for t in routing[:4])) for i in range(len(sizes))]
    terms = on_ranks(
        lambda rank, batch: global_load_balancing_loss(parts[rank], RoutingContext(batch=batch)),
        len(sizes),
    )
    assert_same(torch.stack(terms).mean(), want, logits)
    own = torch.stack([load_balancing_loss(part) for part in parts if len(part.logits)]).mean()
    assert len(sizes) == 1 or abs(float(own - want)) > 1e-3


def test_global_loss_on_one_rank_is_the_plain_one():
    logits, routing = route(7)
    assert_same(
        global_load_balancing_loss(routing, RoutingContext()), load_balancing_loss(routing), logits
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_token_and_sequence_losses_do_not_depend_on_the_split(parts):
    """Equal parts of the global batch, on ranks or as micro-batches: the mean is the same."""
    logits, routing = route(24)
    whole = [z_loss(routing), sequence_load_balancing_loss(routing, RoutingContext(grid=(8, 3)))]
    pieces = [Routing(*(t.chunk(parts)[i] for t in routing[:4])) for i in range(parts)]
    context = RoutingContext(grid=(8 // parts, 3))
    split = [
        torch.stack([z_loss(p) for p in pieces]).mean(),
        torch.stack([sequence_load_balancing_loss(p, context) for p in pieces]).mean(),
    ]
    for a, b in zip(split, whole, strict=True):
        assert_same(a, b, logits)


FUNCTIONS = {
    "load_balancing": lambda routing, context: load_balancing_loss(routing),
    "z_loss": lambda routing, context: z_loss(routing),
    "importance": lambda routing, context: importance_loss(routing),
    "load": lambda routing, context: load_loss(routing),
    "sequence_balancing": sequence_load_balancing_loss,
    "global_balancing": global_load_balancing_loss,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_name_stands_for_its_formula(name):
    logits, routing = route(12, skew=1.0)
    routing = routing._replace(load=torch.sigmoid(logits))
    context = RoutingContext(grid=(3, 4))
    values = {n: float(f(routing, context).detach()) for n, f in FUNCTIONS.items()}
    assert float(loss_value(name, routing, context).detach()) == values[name]
    same = {n for n, value in values.items() if value == values[name]}
    assert same <= {name, "load_balancing", "global_balancing"}  # which are equal on one rank


LAYERS = {
    name: (next(r for r, cls in ROUTERS.items() if name in cls.losses), 0.2 + 0.1 * i)
    for i, name in enumerate(LOSSES)
}
"""Loss -> the first router that has it, and a coefficient."""


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("taken", [False, True])
def test_each_loss_acts_by_itself_with_its_own_coefficient(name, taken):
    """Against the gradient of coefficient * term alone, as the output's own gradient is zero."""
    router, coefficient = LAYERS[name]
    off = {n: 0 for n in LAYERS}
    options = {"init_std": 1.0} if router == "noisy" else {}
    torch.manual_seed(0)
    layer = MoE(4, 6, E, 2, router=router, router_options=options, **{**off, name: coefficient})
    layer.double()
    x = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    seen = []
    layer.router.register_forward_hook(lambda _, args, routing: seen.append((args, routing)))
    y = layer(x)
    leaves = [x, layer.router.weight]
    if taken:
        terms = moe_losses(layer)
        assert terms.keys() == {name}
        (y.sum() * 0 + terms[name]).backward()
    else:
        (y.sum() * 0).backward()
    got = [leaf.grad for leaf in leaves]
    (_, context), routing = seen[0]
    assert layer.last_losses.keys() == {name}
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(0)
    again = MoE(4, 6, E, 2, router=router, router_options=options, **off).double()
    routing = again.router(x.view(12, 4), context)
    term = loss_value(name, routing, context)
    assert float(layer.last_losses[name]) == pytest.approx(float(term), rel=1e-10)
    want = torch.autograd.grad(coefficient * term, [x, again.router.weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.any()


def test_coefficients_can_be_changed_between_steps():
    layer, x = MoE(4, 6, E, 2), torch.randn(6, 4)
    layer.loss_coefficients["sequence_balancing"] = 0.5
    layer.loss_coefficients["load_balancing"] = 0.0
    layer(x)
    assert layer.last_losses.keys() == {"z_loss", "sequence_balancing"}


@pytest.mark.parametrize("name", ["importance", "sequence_balancing", "global_balancing"])
@pytest.mark.parametrize("value", [-0.01, float("nan"), float("inf")])
def test_refused_coefficients(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} is invalid"):
        MoE(4, 6, E, **{name: value})
