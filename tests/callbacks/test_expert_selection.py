"""select_experts on one process: its measures against loops, shares, budgets, and refusals."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from callbacks.blocks import Blocks
from callbacks.model import D_FFN, D_MODEL
from torch import nn

from lightning_fastmoe import MoE, select_experts
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers

BATCHES = [torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture
def model() -> Blocks:
    torch.manual_seed(2)
    return Blocks(3)


def relevance_by_loops(model: nn.Module, by: str) -> dict[str, dict[int, float]]:
    """Pair by pair."""
    found: dict[str, dict[int, float]] = {n: defaultdict(float) for n, _ in expert_layers(model)}

    def note(name, routing):
        for ids, weights in zip(routing.expert_ids.tolist(), routing.weights.tolist(), strict=True):
            for i, weight in zip(ids, weights, strict=True):
                found[name][i] += weight if by == "gate" else 1

    for name, layer in expert_layers(model):
        layer.register_routing_observer(lambda _, routing, name=name: note(name, routing))
    for batch in BATCHES:
        model(batch)
    return {n: {i: v / sum(row.values()) for i, v in row.items()} for n, row in found.items()}


@pytest.mark.parametrize("by", ["load", "gate"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1])
def test_shares_are_reached_by_the_fewest_experts(model, by, share):
    chosen = select_experts(model, BATCHES, by, share)
    for name, row in relevance_by_loops(model, by).items():
        ids = sorted(row, key=lambda i: (-row[i], i))
        number = next(n for n in range(1, 5) if sum(row[i] for i in ids[:n]) >= share - 1e-6)
        assert chosen[name] == sorted(ids[:number]), row


@pytest.mark.parametrize("by", ["load", "gate"])
def test_budgets_take_the_most_relevant_of_all_layers(model, by):
    rows = relevance_by_loops(model, by)
    ranked = sorted(((-v, n, i) for n, row in rows.items() for i, v in row.items()))
    for budget, number in ((1, 1), (5, 5), (0.25, 3), (0.26, 3), (0.34, 4), (100, len(ranked))):
        found = select_experts(model, BATCHES, by, budget=budget)
        assert {(n, i) for n, ids in found.items() for i in ids} == {
            (n, i) for _, n, i in ranked[:number]
        }
        assert all(found.values())
    both = select_experts(model, BATCHES, by, share=0.3, budget=2)
    assert sum(map(len, both.values())) == 2
    of_share = select_experts(model, BATCHES, by, share=0.3)
    assert all(set(ids) <= set(of_share[n]) for n, ids in both.items())


def test_dropped_pairs_do_not_count():
    layer = MoE(4, D_FFN, 4, 1, capacity_factor=(None, 1.0))
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4))
    x = torch.eye(4)[[2, 2, 2, 2, 2, 1, 1, 1]]  # each expert takes a quarter
    seen = []
    layer.register_routing_observer(lambda _, r: seen.append(r.routed_counts().tolist()))
    assert select_experts(nn.Sequential(layer), [x], share=1.0) == {"0": [1, 2]}
    assert select_experts(nn.Sequential(layer), [x], budget=1) == {"0": [1]}
    assert seen == [[0, 3, 5, 0]] * 2


def test_leaves_the_model_as_it_was(model):
    model.blocks[0].dense.eval()
    before = {n: m.training for n, m in model.named_modules()}
    state = {n: v.clone() for n, v in model.state_dict().items()}
    seen = []
    handle = model.blocks[0].moe.register_forward_hook(
        lambda m, i, out: seen.append((m.training, out.requires_grad))
    )
    select_experts(model, BATCHES, share=0.5)
    handle.remove()
    assert seen == [(False, False)] * 3
    assert {n: m.training for n, m in model.named_modules()} == before
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert all(not layer._observers for _, layer in expert_layers(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "a share of tokens, a budget"),
        ({"share": 0}, r"share=0 must be in \(0, 1\]"),
        ({"share": 1.5}, r"share=1.5 must"),
        ({"by": "gradient", "share": 0.2}, "by='gradient' is unknown: use one of load, gate"),
        ({"budget": 0}, "budget=0 must"),
        ({"budget": 1.5}, "budget=1.5 must"),
        ({"budget": True}, "budget=True must"),
        ({"budget": 0.01}, "budget=0.01 of 3072 parameters allows no expert"),
    ],
)
def test_refused_arguments(model, options, match):
    with pytest.raises(ConfigError, match=match) as refused:
        select_experts(model, BATCHES, **options)
    assert "\n" not in str(refused.value)


def test_refused_models():
    x = torch.randn(4, D_MODEL)
    for layer, match in (
        (nn.Linear(1, 1), "there is no MoE layer"),
        (MoE(D_MODEL, D_FFN, 4, router="soft"), "soft routing"),
        (MoE(D_MODEL, D_FFN, 4, 1, expert=lambda d, f: nn.Linear(d, d)), "are modules"),
    ):
        with pytest.raises(ConfigError, match=match):
            select_experts(nn.Sequential(layer), [x[None]], share=0.5)
    with pytest.raises(ConfigError, match="no token reached layer '0'"):
        select_experts(nn.Sequential(MoE(D_MODEL, D_FFN, 4, 1)), [], share=0.5)
