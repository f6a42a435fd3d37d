"""What may be set on a layer between steps is checked as it is at construction."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE

D, E = 8, 4
IN_GROUPS = {"router": "sigmoid", "router_options": {"num_groups": 4, "limit_groups": 2}}
AFTER = {"router_options": {"score_after_selection": True}}


def make(**kwargs) -> MoE:
    torch.manual_seed(0)
    return MoE(D, 8, E, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "name", "value", "message"),
    [
        ({}, "top_k", 5, r"top_k=5 is out of range.*num_experts=4"),
        ({}, "top_k", True, "top_k=True is out of range"),
        ({"normalize_weights": True}, "top_k", 1, "no gradient"),
        (AFTER, "top_k", 1, "always 1"),
        ({"router": "switch"}, "top_k", 2, "top_k=2 doesn't fit Switch routing"),
        ({"router": "gshard"}, "top_k", 3, "top_k=3 doesn't fit GShard"),
        ({"router": "dc"}, "top_k", 1, "top_k=1 doesn't fit GShard"),
        ({"router": "base"}, "top_k", 2, "top_k=2 doesn't fit BASE"),
        ({"router": "noisy"}, "top_k", 1, "top_k=1 is invalid.*at least 2"),
        ({**IN_GROUPS, "top_k": 2}, "top_k", 3, r"limit_groups=2.*top_k=3"),
        ({"router": "sigmoid", "normalize_weights": True}, "top_k", 1, "no gradient"),
        ({"router": "cosine", "normalize_weights": True}, "top_k", 1, "no gradient"),
        ({"router": "expert_choice"}, "top_k", 2, "ExpertChoiceRouter has no top_k"),
        ({}, "capacity_factor", 0.0, "capacity_factor=0.0"),
        ({}, "eval_capacity_factor", float("nan"), "eval_capacity_factor=nan"),
        ({"router": "expert_choice"}, "capacity_factor", None, "must be a number"),
        ({"router": "soft"}, "eval_capacity_factor", 1.0, "drops nothing"),
        ({}, "drop_by", "scores", "drop_by='scores' is unknown.*position, score"),
        ({}, "capacity_over", "world", "capacity_over='world' is unknown.*rank, global"),
    ],
)
def test_a_setting_that_the_layer_could_not_be_built_with_is_refused(
    arguments, name, value, message
):
    layer = make(**arguments)
    before = getattr(layer, name)
    with pytest.raises(ConfigError, match=message):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("load_balancing", -0.1, "load_balancing=-0.1 is invalid"),
        ("z_loss", float("nan"), "z_loss=nan is invalid"),
        ("load", 0.1, "load=0.1.*does not apply to SoftmaxTopKRouter"),
        ("balance", 0.1, "balance is not a loss of a MoE layer.*load_balancing"),
    ],
)
def test_refused_coefficients(name, value, message):
    layer = make()
    layer.loss_coefficients[name] = value
    with pytest.raises(ConfigError, match=message):
        layer(torch.randn(3, D))


def test_what_is_set_acts():
    layer, x = make(load_balancing=0, z_loss=0), torch.randn(24, D)
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    layer(x)
    assert layer.last_losses == {}
    layer.top_k, layer.capacity_factor, layer.drop_by = 3, 0.5, "score"
    layer.loss_coefficients["z_loss"] = 0.1
    layer(x)
    assert [r.expert_ids.shape for r in seen] == [(24, 2), (24, 3)]
    assert int(seen[0].dropped_counts().sum()) == 0
    assert int(seen[1].kept_counts().max()) == 9  # ceil(0.5 * 3 * 24 / 4)
    by_score = seen[1].kept.clone()
    layer.drop_by = "position"
    layer(x)
    assert not torch.equal(seen[2].kept, by_score)
    assert layer.last_losses.keys() == {"z_loss"}
