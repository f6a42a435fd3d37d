"""Each router against its formula in fp64: choices, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_fastmoe.nn.router import (
    BaseRouter,
    CosineTopKRouter,
    DCRouter,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    RoutingContext,
    SigmoidTopKRouter,
    SinkhornRouter,
    SoftmaxTopKRouter,
    SoftRouter,
    SwipeRouter,
    SwitchRouter,
    TopologyAwareRouter,
)
from lightning_fastmoe.ops import reference, reference_routers

D = 5
CASES = [(1, 1, 1), (7, 5, 1), (11, 7, 3), (6, 4, 4), (9, 2, 2)]
"""(T, E, K); K = E among them."""
SEED, FIRST = 1234567, 40


def make(cls, tokens, *args, **kwargs):
    """An fp64 router with parameters that aren't zero, and tokens."""
    torch.manual_seed(0)
    router = cls(D, *args, **kwargs).double()
    with torch.no_grad():
        for parameter in router.parameters():
            if not parameter.any():
                parameter.normal_()
    return router, torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)


def training(**kwargs):
    return RoutingContext(training=True, seed=SEED, first_token=torch.tensor(FIRST), **kwargs)


EVALUATION = RoutingContext(training=False)


def best(scores, k):
    """Ids (T, K) of the largest scores."""
    return reference_routers.biased_top_k(scores, torch.zeros(()), k)


def assert_same(got, want, leaves):
    """Values and gradients of pairs of tensors."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        upstream = torch.randn_like(a)
        options = {"retain_graph": True, "allow_unused": True}
        got_grads = torch.autograd.grad(a, leaves, upstream, **options)
        want_grads = torch.autograd.grad(b, leaves, upstream, **options)
        for c, d in zip(got_grads, want_grads, strict=True):
            c, d = (torch.zeros(()) if g is None else g for g in (c, d))
            torch.testing.assert_close(c, d.expand_as(c), rtol=1e-9, atol=1e-12)


def draws(tokens, columns, stream=0):
    return torch.tensor(
        [
            [reference_routers.uniform(SEED, stream, FIRST + t, c) for c in range(columns)]
            for t in range(tokens)
        ],
        dtype=torch.float64,
    ).view(tokens, columns)


@pytest.mark.parametrize(("tokens", "experts", "k"), [c for c in CASES if c[2] > 1])
def test_softmax_after_selection(tokens, experts, k):
    router, x = make(SoftmaxTopKRouter, tokens, experts, k, score_after_selection=True)
    got = router(x)
    logits = x @ router.weight.T
    weights, ids = reference_routers.softmax_after_selection(logits, k)
    assert torch.equal(got.expert_ids, ids)
    assert_same([got.weights, got.scores], [weights, logits.softmax(1)], [x, router.weight])
    normalised = make(SoftmaxTopKRouter, tokens, experts, k)[0](x)
    torch.testing.assert_close(got.weights, normalised.weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES)
@pytest.mark.parametrize("cls", [SoftmaxTopKRouter, SigmoidTopKRouter])
def test_the_bias_chooses_and_nothing_else(cls, tokens, experts, k):
    router, x = make(cls, tokens, experts, k, balance_bias=True)
    plain = router(x)
    bias = torch.randn(experts)
    router.balance_bias.copy_(bias)
    got = router(x)
    raw = torch.sigmoid(plain.logits) if cls is SigmoidTopKRouter else plain.scores
    ids = reference_routers.biased_top_k(raw, bias.double(), k)
    assert torch.equal(got.expert_ids, ids)
    weights = raw.gather(1, ids)
    if k > 1:
        weights = weights / weights.sum(dim=1, keepdim=True)
    assert_same([got.weights, got.scores], [weights, plain.scores], [x, router.weight])
    if k < experts:
        assert not torch.equal(ids, plain.expert_ids)


@pytest.mark.parametrize(("tokens", "experts", "k"), [c for c in CASES if c[2] > 1])
def test_noisy_top_k(tokens, experts, k):
    router, x = make(NoisyTopKRouter, tokens, experts, k, init_std=0.5, noise=1.3)
    got = router(x, training())
    clean = x @ router.weight.T
    size = 1.3 * F.softplus(x @ router.noise_weight.T)
    z = torch.special.ndtri(draws(tokens, experts) + 2.0**-25)
    leaves = list(router.parameters()) + [x]
    if k == experts:
        weights, ids = reference_routers.softmax_after_selection(clean + size * z, k)
        assert torch.equal(got.load, torch.ones_like(got.load))
        assert_same([got.weights], [weights], leaves)
    else:
        gates, weights, ids, load = reference_routers.noisy_top_k(clean, size, z, k)
        assert_same([got.scores, got.weights, got.load], [gates, weights, load], leaves)
    assert torch.equal(got.expert_ids, ids)
    quiet = router(x, EVALUATION)
    assert torch.equal(quiet.expert_ids, reference_routers.softmax_after_selection(clean, k)[1])
    assert quiet.load is None
    router.noise = 0.0
    assert torch.equal(router(x, training()).expert_ids, quiet.expert_ids)


def test_noisy_load_is_the_chance_of_being_chosen():
    """Drawn anew a thousand times, an expert's own noise lets it in as often as `load` says."""
    router, x = make(NoisyTopKRouter, 3, 5, 2, init_std=0.5)
    x = x.detach()
    got = router(x, training())
    clean, size = x @ router.weight.T, F.softplus(x @ router.noise_weight.T)
    h = got.logits.detach()
    z = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    for t in range(3):
        for e in range(5):
            others = torch.cat([h[t, :e], h[t, e + 1 :]])
            chance = (clean[t, e] + size[t, e] * z > others.sort().values[-2]).double().mean()
            assert got.load[t, e].item() == pytest.approx(float(chance), abs=1e-3)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (7, 5)])
def test_switch_jitters_inputs_in_training_alone(tokens, experts):
    router, x = make(SwitchRouter, tokens, experts, jitter=0.3)
    got = router(x, training())
    logits = (x * (0.7 + 0.6 * draws(tokens, D))) @ router.weight.T
    scores, weights, ids = reference.softmax_top_k(logits, 1, normalize=False)
    assert torch.equal(got.expert_ids, ids)
    assert_same(
        [got.logits, got.scores, got.weights], [logits, scores, weights], [x, router.weight]
    )
    torch.testing.assert_close(router(x, EVALUATION).logits, x @ router.weight.T)
    router.jitter = 0.0
    torch.testing.assert_close(router(x, training()).logits, x @ router.weight.T)


@pytest.mark.parametrize("cls", [GShardRouter, DCRouter])
@pytest.mark.parametrize(("tokens", "experts"), [(31, 5), (9, 2)])
def test_gshard_uses_the_second_expert_at_random(cls, tokens, experts):
    router, x = make(cls, tokens, experts)
    with torch.no_grad():
        router.weight *= 3
    got = router(x, training())
    weights, ids, used = reference_routers.gshard(x @ router.weight.T, draws(tokens, 1).squeeze(1))
    assert torch.equal(got.expert_ids, ids)
    assert torch.equal(got.active, used)
    assert 0 < int(used[:, 1].sum()) < tokens
    assert_same([got.weights], [weights], [x, router.weight])
    assert router(x, EVALUATION).active is None
    router.random_second = False
    assert router(x, training()).active is None


def test_gshard_uses_the_second_expert_as_often_as_its_weight_says():
    router, x = make(GShardRouter, 4000, 2)
    got = router(x, training())
    second = got.weights[:, 1].detach()
    want = float((2 * second).clamp(max=1).mean())
    assert float(got.active[:, 1].double().mean()) == pytest.approx(want, abs=0.02)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "groups", "limit"),
    [(7, 6, 2, 3, 2), (9, 8, 3, 4, 3), (5, 4, 2, 4, 2), (6, 8, 4, 2, 1), (4, 6, 3, 3, None)],
)
def test_sigmoid_in_groups(tokens, experts, k, groups, limit):
    router, x = make(
        SigmoidTopKRouter, tokens, experts, k, num_groups=groups, limit_groups=limit, scale=2.5
    )
    router.balance_bias.copy_(0.2 * torch.randn(experts))
    got = router(x)
    want = reference_routers.grouped_sigmoid_top_k(
        x @ router.weight.T, router.balance_bias.double(), k, groups, limit or groups, 2.5
    )
    assert torch.equal(got.expert_ids, want[2])
    assert_same([got.scores, got.weights], want[:2], [x, router.weight])


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES)
@pytest.mark.parametrize("learned", [False, True])
def test_cosine_logits_equal_the_formula(tokens, experts, k, learned):
    router, x = make(
        CosineTopKRouter, tokens, experts, k, d_router=3, temperature=0.2, learn_temperature=learned
    )
    got = router(x)
    tau = torch.exp(-router.log_scale)
    assert tau.item() == pytest.approx(0.2)
    logits = reference_routers.cosine_logits(x, router.projection, router.embedding, tau)
    scores, weights, ids = reference.softmax_top_k(logits, k, normalize=k > 1)
    assert torch.equal(got.expert_ids, ids)
    leaves = [x, *(p for p in router.parameters() if p.requires_grad)]
    assert len(leaves) == 3 + learned
    assert_same([got.logits, got.scores, got.weights], [logits, scores, weights], leaves)


def test_cosine_temperature_has_a_floor():
    router, x = make(CosineTopKRouter, 7, 4)
    router.log_scale.data.fill_(50.0)
    assert float(router(x).logits.abs().max()) <= 100.0 * (1 + 1e-12)


@pytest.mark.parametrize("over", ["sequence", "rank"])
@pytest.mark.parametrize(("grid", "experts", "factor"), [((2, 6), 4, 1.0), ((3, 5), 3, 2.0)])
def test_expert_choice(over, grid, experts, factor):
    router, x = make(ExpertChoiceRouter, math.prod(grid), experts, over=over)
    got = router(x, RoutingContext(grid=grid, capacity_factor=factor))
    scores = torch.stack([torch.softmax(row, 0) for row in x @ router.weight.T])
    groups, n = grid if over == "sequence" else (1, math.prod(grid))
    want, pairs = [], []
    for g in range(groups):
        capacity = math.ceil(factor * n / experts)
        weights, chosen = reference_routers.expert_choice(scores[g * n : (g + 1) * n], capacity)
        assert len(chosen) == capacity * experts
        want.append(weights)
        pairs += [(e, g * n + t) for e, t in chosen]
    assert list(zip(got.expert_ids.tolist(), got.token_ids.tolist(), strict=True)) == pairs
    dense = torch.zeros_like(scores).index_put((got.token_ids, got.expert_ids), got.weights)
    assert_same([dense, got.scores], [torch.cat(want), scores], [x, router.weight])


def test_expert_choice_takes_at_most_all_tokens():
    router, x = make(ExpertChoiceRouter, 3, 2)
    got = router(x, RoutingContext(capacity_factor=9.0))
    assert got.routed_counts().tolist() == [3, 3]


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_mixes_equal_the_formula_per_sequence(slots):
    router, x = make(SoftRouter, 8, 3, slots_per_expert=slots)
    router.scale.data.fill_(2.5)
    got = router(x, RoutingContext(grid=(2, 4)))
    leaves = [x, router.weight, router.scale]
    for g in range(2):
        mixes = reference_routers.soft_mixes(x[g * 4 : (g + 1) * 4], router.weight, router.scale)
        assert_same([got.dispatch_mix[g], got.combine_mix[g]], mixes, leaves)
        per_expert = mixes[1].view(4, 3, slots).sum(dim=2)
        assert_same([got.scores[g * 4 : (g + 1) * 4]], [per_expert], leaves)
    assert got.expert_ids.flatten().tolist() == [e for e in range(3) for _ in range(slots)] * 2
    assert bool((got.weights == 1).all())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_hash_takes_the_experts_of_the_token_ids_largest_bits(k):
    router, x = make(HashRouter, 50, 4, k, seed=7)
    ids = torch.arange(50) % 23
    got = router(x, RoutingContext(token_ids=ids))
    for t in range(50):
        bits = [reference_routers.random_bits(7, 0, int(ids[t]), e) for e in range(4)]
        want = sorted(range(4), key=lambda e: -bits[e])[:k]
        assert got.expert_ids[t].tolist() == want
    assert torch.equal(got.weights, torch.full((50, k), 1 / k, dtype=torch.float64))
    other = HashRouter(D, 4, k, seed=8)(x, RoutingContext(token_ids=ids))
    assert not torch.equal(other.expert_ids, got.expert_ids)


@pytest.mark.parametrize(("tokens", "experts"), [(8, 3), (6, 2), (7, 7), (3, 5), (1, 1), (8, 4)])
def test_base_assigns_even_loads_of_the_best_total(tokens, experts):
    router, x = make(BaseRouter, tokens, experts, tolerance=1e-9)
    got = router(x, training())
    logits = (x @ router.weight.T).detach()
    total = float(logits.gather(1, got.expert_ids).sum())
    assert total == pytest.approx(reference_routers.best_assignment(logits), abs=1e-6)
    counts = got.routed_counts().tolist()
    assert counts == [tokens // experts + (e < tokens % experts) for e in range(experts)]
    weights = torch.sigmoid((x @ router.weight.T).gather(1, got.expert_ids))
    assert_same([got.weights], [weights], [x, router.weight])
    assert torch.equal(router(x, EVALUATION).expert_ids[:, 0], logits.argmax(dim=1))


def test_base_on_many_and_on_equal_tokens():
    router, x = make(BaseRouter, 400, 8)
    logits = (x @ router.weight.T).detach()
    got = router(x, training())
    assert got.routed_counts().tolist() == [50] * 8
    chosen = float(logits.gather(1, got.expert_ids).mean())
    round_robin = float(logits.gather(1, (torch.arange(400) % 8).unsqueeze(1)).mean())
    assert chosen > round_robin + 0.3 * float(logits.std())
    same = router(x[:1].expand(40, -1), training())
    assert same.routed_counts().tolist() == [5] * 8


@pytest.mark.parametrize(("tokens", "experts", "k"), [(12, 4, 1), (9, 3, 2), (5, 5, 5)])
def test_sinkhorn_chooses_by_the_plan_and_weighs_by_logits(tokens, experts, k):
    router, x = make(SinkhornRouter, tokens, experts, k, iterations=5)
    with torch.no_grad():
        router.weight[0] *= 5
    got = router(x, training())
    logits = x @ router.weight.T
    plan = reference_routers.sinkhorn_plan(logits.detach(), 5)
    ids = torch.tensor(
        [reference_routers.biased_top_k(r[None], torch.zeros(()), k)[0].tolist() for r in plan]
    )
    assert torch.equal(got.expert_ids, ids)
    chosen = logits.gather(1, ids)
    weights = torch.sigmoid(chosen) if k == 1 else torch.softmax(chosen, dim=1)
    assert_same([got.weights], [weights], [x, router.weight])
    assert torch.equal(router(x, EVALUATION).expert_ids, best(logits, k))


class Ranks:
    """The counts of several ranks, put together by hand."""

    def __init__(self, table, rank, near=None, expert_ranks=1):
        self.table, self.rank, self.size = table, rank, len(table)
        self.near, self.num_expert_ranks = near, expert_ranks

    def gather_counts(self, counts, layer):
        if self.table[self.rank] is None:
            self.table[self.rank] = counts
            return torch.stack([counts] * self.size)
        assert torch.equal(self.table[self.rank], counts)
        return torch.stack(self.table)

    def near_experts(self, num_experts):
        return torch.tensor(self.near)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "groups"),
    [((7,), 4, 1, 2), ((7, 5), 6, 2, 3), ((4, 0, 9), 4, 3, 4), ((6,), 4, 4, 1), ((8, 8), 8, 2, 4)],
)
def test_swipe_equals_the_reference_over_ranks(tokens, experts, k, groups):
    router, x = make(SwipeRouter, sum(tokens), experts, k, num_groups=groups)
    with torch.no_grad():
        router.weight[0] *= 20  # many tokens want expert 0
    logits = x @ router.weight.T
    want = reference_routers.swipe([part.detach() for part in logits.split(tokens)], k, groups)
    table = [None] * len(tokens)
    for _ in range(2):  # once to collect the counts
        got = [
            router(part, training(batch=Ranks(table, rank)))
            for rank, part in enumerate(x.split(tokens))
        ]
    for routing, ids in zip(got, want, strict=True):
        assert torch.equal(routing.expert_ids, ids)
    ids = torch.cat(want)
    loads = torch.bincount(ids.flatten() // (experts // groups), minlength=groups)
    assert int(loads.max()) <= math.ceil(sum(tokens) * k / groups)
    chosen = logits.gather(1, ids)
    weights = chosen.softmax(1) if k > 1 else logits.softmax(1).gather(1, ids)
    assert_same([torch.cat([r.weights for r in got])], [weights], [x, router.weight])
    plain = best(logits, k)
    assert torch.equal(router(x, EVALUATION).expert_ids, plain)
    if groups > 1:
        assert not torch.equal(ids, plain)


@pytest.mark.parametrize(
    ("tokens", "k", "fraction"), [(11, 2, 0.3), (9, 1, 0.5), (8, 2, 0.0), (5, 3, 1.0)]
)
def test_topology_aware(tokens, k, fraction):
    router, x = make(TopologyAwareRouter, tokens, 6, k, outgoing_fraction=fraction)
    near = [True, False, True, False, False, True]
    got = router(x, RoutingContext(batch=Ranks([None], 0, near)))
    logits = x @ router.weight.T
    want = reference_routers.topology_aware(logits.detach(), near, k, int(fraction * tokens))
    assert torch.equal(got.expert_ids, want)
    leaving = (~torch.tensor(near)[want]).any(dim=1).sum()
    assert int(leaving) <= int(fraction * tokens)
    chosen = logits.gather(1, want)
    weights = chosen.softmax(1) if k > 1 else logits.softmax(1).gather(1, want)
    assert_same([got.weights], [weights], [x, router.weight])
    assert torch.equal(router(x).expert_ids, best(logits, k))
