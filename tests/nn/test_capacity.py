"""Who is dropped, that nothing is lost silently, and what a layer with dropped slots computes."""

from __future__ import annotations

import math

import pytest
import torch
from nn.thread_ranks import on_ranks

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import LocalDispatcher, MoE, Routing, SequentialSchedule
from lightning_fastmoe.nn.capacity import limit_by_capacity
from lightning_fastmoe.nn.global_batch import LocalBatch
from lightning_fastmoe.ops import reference, reference_routers

CASES = [(1, 1, 1), (13, 5, 1), (16, 4, 2), (9, 6, 3), (8, 3, 3), (0, 4, 2)]
"""(T, E, K)."""


def route(tokens, experts, k, inactive=0.0):
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    logits[:, 0] += 1.0
    scores = logits.softmax(dim=1)
    ids = reference_routers.biased_top_k(scores, torch.zeros(()), k)
    active = torch.rand(tokens, k) >= inactive if inactive else None
    return Routing(logits, scores, scores.gather(1, ids), ids, active=active)


def limit(routing, factor, over="rank", by="position", batch=None):
    return limit_by_capacity(
        routing, factor, over=over, by=by, batch=batch or LocalBatch(), layer="MoE"
    )


def by_reference(routing, factor, by):
    tokens, k = routing.expert_ids.shape
    experts = routing.logits.shape[1]
    used = torch.ones(tokens, k, dtype=torch.bool) if routing.active is None else routing.active
    priority = None
    if by == "score":
        priority = routing.scores.gather(1, routing.expert_ids).amax(dim=1).tolist()
    capacity = math.ceil(factor * k * tokens / experts)
    return reference_routers.capacity_mask(routing.expert_ids, used, capacity, experts, priority)


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES)
@pytest.mark.parametrize("by", ["position", "score"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 50.0])
@pytest.mark.parametrize("inactive", [0.0, 0.4])
def test_equals_reference_and_conserves_tokens(tokens, experts, k, by, factor, inactive):
    routing = route(tokens, experts, k, inactive)
    got = limit(routing, factor, by=by)
    assert torch.equal(got.kept, by_reference(routing, factor, by))
    capacity = math.ceil(factor * k * tokens / experts)
    routed, kept, dropped = got.routed_counts(), got.kept_counts(), got.dropped_counts()
    assert torch.equal(routed, kept + dropped)
    assert torch.equal(kept, routed.clamp(max=capacity))
    active = tokens * k if routing.active is None else int(routing.active.sum())
    assert int(routed.sum()) == active
    assert int(got.kept.sum()) == int(kept.sum())
    if factor == 50.0:
        assert int(dropped.sum()) == 0


@pytest.mark.parametrize("sizes", [(16,), (8, 8), (3, 13), (5, 0, 11)])
@pytest.mark.parametrize("by", ["position", "score"])
@pytest.mark.parametrize("inactive", [0.0, 0.4])
def test_global_capacity_is_that_of_all_tokens(sizes, by, inactive):
    routing = route(16, 4, 2, inactive)
    want = by_reference(routing, 0.5, by)
    parts = [
        Routing(*(None if t is None else t.split(sizes)[i] for t in routing))
        for i in range(len(sizes))
    ]
    got = on_ranks(
        lambda rank, batch: limit(parts[rank], 0.5, "global", by, batch).kept, len(sizes)
    )
    assert torch.equal(torch.cat(got), want)
    if len(sizes) > 1:
        own = torch.cat([limit(part, 0.5, "rank", by).kept for part in parts])
        assert not torch.equal(own, want)


def test_first_choices_come_before_second_ones():
    ids = torch.tensor([[1, 0], [0, 1], [0, 1]])
    scores = torch.full((3, 2), 0.5, dtype=torch.float64)
    routing = Routing(scores, scores, scores, ids)
    assert limit(routing, 2 / 3).kept.tolist() == [[True, False], [True, True], [True, False]]


def test_the_best_scores_keep_their_place():
    scores = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    routing = Routing(scores, scores, scores[:, :1], torch.tensor([[0], [0], [0], [1]]))
    kept = limit(routing, 1.0, by="score").kept
    assert kept.flatten().tolist() == [False, True, True, True]
    assert limit(routing, 1.0).kept.flatten().tolist() == [True, True, False, True]


def make(tokens=16, factor=0.5, chain=False, **kwargs):
    torch.manual_seed(0)
    layer = MoE(
        5, 3, 4, 2, capacity_factor=factor, bias=True, load_balancing=0, z_loss=0, **kwargs
    ).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if chain:
        # Drops rows, as ranks do.
        layer.schedule = SequentialSchedule(LocalDispatcher(4))
    return layer, torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("by", ["position", "score"])
def test_dropped_slots_contribute_zero(chain, by):
    layer, x = make(chain=chain, drop_by=by)
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    got = layer(x)
    (routing,) = seen
    kept = by_reference(routing, 0.5, by)
    assert torch.equal(routing.kept, kept)
    assert 0 < int(kept.sum()) < 32
    own = layer.router(x)
    e = layer.experts
    want = reference.moe(
        x, own.weights * kept, own.expert_ids, e.up_proj, e.down_proj, e.activation, e.up_bias,
        e.down_bias,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    nowhere = ~kept.any(dim=1)
    assert bool(nowhere.any())
    assert not got[nowhere].any()


@pytest.mark.parametrize("chain", [False, True])
def test_an_expert_may_drop_everything(chain):
    """More experts than tokens, and a router of one mind."""
    layer, x = make(tokens=3, factor=0.1, chain=chain)
    with torch.no_grad():
        layer.router.weight.zero_()
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_settings_change_between_steps_without_rebuilding():
    layer, x = make(factor=(0.5, 1.5))
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    parameters = [id(p) for p in layer.parameters()]

    def run(**settings):
        for name, value in settings.items():
            setattr(layer, name, value)
        layer(x)
        return seen[-1]

    assert run().kept_counts().max() <= 4
    assert run(capacity_factor=0.25).kept_counts().max() <= 2
    assert run(capacity_factor=None).kept is None
    assert run(top_k=3).expert_ids.shape == (16, 3)
    assert run(capacity_factor=1.0, drop_by="score").kept.shape == (16, 3)
    layer.eval()
    assert torch.equal(run().kept, by_reference(seen[-1], 1.5, "score"))
    assert run(eval_capacity_factor=None).kept is None
    assert (layer.capacity_factor, layer.eval_capacity_factor, layer.top_k) == (1.0, None, 3)
    assert [id(p) for p in layer.parameters()] == parameters


def test_the_noise_changes_between_steps():
    layer = MoE(5, 3, 4, router="switch", router_options={"jitter": 0.5})
    x = torch.randn(9, 5)
    logits = []
    layer.register_routing_observer(lambda _, routing: logits.append(routing.logits))
    layer(x)
    layer.router.jitter = 0.0
    layer(x)
    torch.testing.assert_close(logits[1], x @ layer.router.weight.T)
    assert not torch.allclose(logits[0], logits[1])


def test_gshard_has_its_own_factors_and_dc_its_own_scope():
    for name, over in (("gshard", "rank"), ("dc", "global")):
        layer = MoE(5, 3, 4, router=name)
        assert (layer.capacity_factor, layer.eval_capacity_factor) == (1.2, 2.4)
        assert layer.capacity_over == over
    assert MoE(5, 3, 4, router="gshard", capacity_factor=None).capacity_factor is None
    assert MoE(5, 3, 4).capacity_factor is None


def test_expert_choice_takes_the_layers_factor():
    layer, x = MoE(5, 3, 4, router="expert_choice", capacity_factor=(1.0, 3.0)), torch.randn(8, 5)
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    layer(x)
    layer.eval()(x)
    layer.eval_capacity_factor = 2.0
    layer(x)
    assert [r.routed_counts().tolist() for r in seen] == [[2] * 4, [6] * 4, [4] * 4]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"capacity_factor": 0}, "capacity_factor=0 is invalid"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 is invalid"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan is invalid"),
        ({"capacity_factor": True}, "capacity_factor=True is invalid"),
        ({"capacity_factor": (1.0, 0.0)}, "capacity_factor=0.0 is invalid"),
        ({"capacity_factor": (1.0, 2.0, 3.0)}, "a pair is"),
        ({"capacity_factor": "big"}, "capacity_factor='big' is unknown"),
        ({"capacity_over": "node"}, "capacity_over='node' is unknown.*rank, global"),
        ({"drop_by": "chance"}, "drop_by='chance' is unknown.*position, score"),
        ({"router": "expert_choice", "capacity_factor": None}, "must be a number"),
        ({"router": "soft", "capacity_factor": 1.0}, "drops nothing"),
    ],
)
def test_options_of_the_capacity_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        MoE(5, 3, 4, **kwargs)


@pytest.mark.parametrize(("name", "value"), [("capacity_factor", 0.0), ("top_k", 5)])
def test_refused_between_steps(name, value):
    layer = MoE(5, 3, 4)
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        setattr(layer, name, value)
    with pytest.raises(ConfigError, match="has no top_k"):
        MoE(5, 3, 4, router="soft").top_k = 2


def test_a_capacity_for_what_is_no_token_choice_is_refused():
    class Pairs(torch.nn.Module):
        def forward(self, x):
            scores = torch.full((len(x), 4), 0.25)
            ids = torch.arange(4)
            return Routing(scores, scores, torch.ones(4), ids, token_ids=ids)

    layer = MoE(5, 3, 4, router=Pairs(), capacity_factor=1.0, load_balancing=0, z_loss=0)
    with pytest.raises(ConfigError, match="limits token choice, but Pairs"):
        layer(torch.randn(6, 5))
