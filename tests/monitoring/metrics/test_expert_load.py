from __future__ import annotations

import math

import pytest
import torch

from lightning_fastmoe.metrics import ExpertLoad
from lightning_fastmoe.nn import MoE, Routing


def routing(scores, expert_ids):
    scores = torch.tensor(scores)
    ids = torch.tensor(expert_ids)
    return Routing(scores.log(), scores, scores.gather(1, ids), ids)


UNIFORM, SURE = [0.25] * 4, [1.0, 0.0, 0.0, 0.0]
A1 = routing([UNIFORM, SURE], [[0, 1], [0, 2]])
A2 = routing([UNIFORM], [[0, 1]])
B1 = routing([[0.5, 0.5]], [[1]])


def make():
    return ExpertLoad([4, 2], ["a", "b"])


def assert_values(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert got[name].item() == pytest.approx(value, rel=1e-6, abs=1e-7), name


WANT_A = {
    # Loads 3 2 1 0 over a mean of 1.5; two of three tokens have entropy log 4.
    "a/max_load": 2.0,
    "a/min_load": 0.0,
    "a/load_cv": math.sqrt((1.0 + 1 / 9 + 1 / 9 + 1.0) / 4),
    "a/dead_experts": 1.0,
    "a/drop_rate": 0.0,
    "a/entropy": 2 * math.log(4) / 3,
    "a/confidence": (0.25 + 1.0 + 0.25) / 3,
}
WANT_B = {
    "b/max_load": 2.0,
    "b/min_load": 0.0,
    "b/load_cv": 1.0,
    "b/dead_experts": 1.0,
    "b/drop_rate": 0.0,
    "b/entropy": math.log(2),
    "b/confidence": 0.5,
}


def test_sums_and_values_equal_those_computed_by_hand():
    metric = make()
    metric.update(0, A1)
    metric.update(0, A2)
    metric.update(1, B1)
    assert metric.packed.tolist() == [
        pytest.approx([3, 2, 1, 0, 3, 2, 1, 0, 3, 2 * math.log(4), 1.5]),
        pytest.approx([0, 1, 0, 1, 0, 0, 0, 0, 1, math.log(2), 0.5]),
    ]
    assert_values(metric.compute(), WANT_A | WANT_B)


def test_a_layer_without_tokens_is_left_out():
    metric = make()
    metric.update(0, A1)
    metric.update(0, A2)
    assert_values(metric.compute(), WANT_A)
    assert make().summarize(make().packed) == {}


def test_ranks_are_merged_by_adding_their_states():
    ranks = [make(), make(), make()]
    ranks[0].update(0, A1)
    ranks[1].update(0, A2)
    ranks[1].update(1, B1)
    total = sum(metric.packed for metric in ranks)
    assert_values(ranks[2].summarize(total), WANT_A | WANT_B)


def test_reset_starts_anew():
    metric = make()
    metric.update(0, A2)
    metric.reset()
    metric.update(1, B1)
    assert_values(metric.compute(), WANT_B)


def test_counts_what_a_layer_routes():
    torch.manual_seed(0)
    layer, metric = MoE(5, 3, 4, 2), ExpertLoad([4], ["moe"])
    layer.register_routing_observer(lambda _, routing: metric.update(0, routing))
    x = torch.randn(3, 7, 5)
    layer(x)
    layer(x[0])
    ids = [layer.router(x.reshape(-1, 5)).expert_ids, layer.router(x[0]).expert_ids]
    want = sum(torch.bincount(i.flatten(), minlength=4) for i in ids)
    assert metric.packed[0, :4].tolist() == want.tolist()
    assert metric.packed[0, -3].item() == 28
    entropy = metric.compute()["moe/entropy"].item()
    assert 0.5 < entropy < math.log(4)


def test_layers_of_a_state():
    metric = make()
    metric.update(0, A1._replace(kept=torch.tensor([[True, True], [False, True]])))
    (only,) = metric.layers(metric.packed)
    assert (only.name, only.tokens) == ("a", 2)
    assert only.routed.tolist() == [2, 1, 1, 0]
    assert only.kept.tolist() == [1, 1, 1, 0]
    assert only.entropy == pytest.approx(math.log(4) / 2)
    assert metric.compute()["a/drop_rate"].item() == 0.25
