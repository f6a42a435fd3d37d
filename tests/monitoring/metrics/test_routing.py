"""Each metric against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe import metrics
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, Routing

UNIFORM, SURE, HALF = [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]
T, F = True, False


def routing(scores, ids, **kwargs):
    p = torch.tensor(scores)
    return Routing(p.log(), p, torch.ones(torch.tensor(ids).shape), torch.tensor(ids), **kwargs)


FIRST = routing([UNIFORM, SURE, HALF], [[0, 1], [0, 2], [1, 0]])
# One slot is not used, one is dropped.
SECOND = routing(
    [UNIFORM, HALF],
    [[1, 0], [1, 2]],
    active=torch.tensor([[T, T], [T, F]]),
    kept=torch.tensor([[T, F], [T, F]]),
)
# routed: 0 four times, 1 four times, 2 once, 3 never; kept: 0 three times.
SCALARS = {
    metrics.LoadCV: math.sqrt(((4 / 2.25 - 1) ** 2 * 2 + (1 / 2.25 - 1) ** 2 + 1) / 4),
    metrics.DeadExperts: 1,
    metrics.DropRate: 1 / 9,
    metrics.RouterEntropy: (2 * math.log(4) + 2 * math.log(2)) / 5,
    metrics.RouterConfidence: (0.25 + 1 + 0.5 + 0.25 + 0.5) / 5,
}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_equal_those_computed_by_hand_and_reset(kind):
    metric = kind(4)
    metric.update(FIRST)
    metric.update(SECOND)
    assert metric.compute().item() == pytest.approx(SCALARS[kind], rel=1e-7)
    metric.reset()
    metric.update(FIRST)
    metric.update(SECOND)
    assert metric.compute().item() == pytest.approx(SCALARS[kind], rel=1e-7)


def test_load_ratio_is_over_the_mean_of_all_updates():
    metric = metrics.LoadRatio(4)
    metric.update(FIRST)
    metric.update(SECOND)
    assert metric.compute().tolist() == pytest.approx([4 / 2.25, 4 / 2.25, 1 / 2.25, 0])


def test_co_activation_is_relative_to_the_rows_expert():
    metric = metrics.ExpertCoActivation(4)
    metric.update(FIRST)
    metric.update(SECOND)
    # Together: 0 and 1 in three tokens, 0 and 2 in one; the unused slot does not count.
    nan = math.nan
    want = [[1, 0.75, 0.25, 0], [0.75, 1, 0, 0], [1, 0, 1, 0], [nan, nan, nan, nan]]
    torch.testing.assert_close(
        metric.compute(), torch.tensor(want, dtype=torch.float64), equal_nan=True
    )


def test_co_activation_of_other_forms():
    chosen_by_experts = routing([UNIFORM] * 3, [0, 1, 1, 0], token_ids=torch.tensor([0, 0, 2, 1]))
    metric = metrics.ExpertCoActivation(4)
    metric.update(chosen_by_experts)
    assert metric.together.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0] * 4, [0] * 4]
    soft = MoE(4, 8, 3, router="soft")
    metric = metrics.ExpertCoActivation(3)
    metric.observe(soft)
    soft(torch.randn(2, 5, 4))
    assert metric.together.tolist() == [[10] * 3] * 3


def test_counts_are_exact_under_autocast_and_survive_casts():
    ids = [[0, 1]] * 1001
    many = routing([UNIFORM] * 1001, ids)
    holder = nn.ModuleDict({"pairs": metrics.ExpertCoActivation(4), "h": metrics.RouterEntropy(4)})
    with torch.autocast("cpu", torch.bfloat16):
        for metric in holder.values():
            metric.update(many)
    for cast in (lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half()):
        cast(holder)
        assert holder["pairs"].together[0, 1].item() == 1001
        assert holder["h"].total.dtype == torch.float64
        assert holder["h"].compute().item() == pytest.approx(math.log(4), rel=1e-6)
    holder["h"].reset()
    assert holder["h"].total.dtype == torch.float64


def test_observes_training_or_evaluation_and_no_replay():
    torch.manual_seed(0)
    layer = MoE(6, 8, 4, 2)
    train, evaluate = metrics.LoadRatio(4), metrics.LoadRatio(4)
    handle = train.observe(layer)
    evaluate.observe(layer, training=False)
    x = torch.randn(7, 6, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    (y.sum() * 2).backward()
    assert train.routed.sum().item() == 14
    layer.eval()
    layer(x)
    layer(x)
    assert (train.routed.sum().item(), evaluate.routed.sum().item()) == (14, 28)
    handle.remove()
    layer.train()
    layer(x)
    assert train.routed.sum().item() == 14


def test_masked_tokens_do_not_count():
    layer = MoE(6, 8, 4, 2)
    metric = metrics.RouterConfidence(4)
    metric.observe(layer)
    layer(torch.randn(5, 6), mask=torch.tensor([0, 1, 0, 1, 1]))
    assert metric.tokens.item() == 2


def test_wrong_sizes():
    with pytest.raises(ConfigError, match="num_experts=0"):
        metrics.LoadCV(0)
    with pytest.raises(ConfigError, match="3.*4 experts"):
        metrics.LoadCV(3).observe(MoE(4, 4, 4, 2))


def test_the_functions_are_defined_without_tokens_too():
    assert metrics.load_ratio(torch.tensor([4, 0, 2])).tolist() == [2.0, 0.0, 1.0]
    assert metrics.load_ratio(torch.zeros(3, dtype=torch.long)).tolist() == [0.0, 0.0, 0.0]
    assert metrics.load_cv(torch.tensor([9, 0, 0, 0])).item() == pytest.approx(math.sqrt(3))
    assert metrics.drop_rate(torch.tensor([3, 1]), torch.tensor([2, 1])).item() == 0.25
    assert metrics.drop_rate(torch.zeros(2), torch.zeros(2)).item() == 0.0
