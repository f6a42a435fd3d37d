"""Total and active parameters, by hand."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_fastmoe.nn import MoE
from lightning_fastmoe.planning.sizes import model_size


def layer(**options):
    return MoE(8, 16, 4, **options)


EXPERT = 3 * 8 * 16  # SwiGLU


@pytest.mark.parametrize(
    ("options", "per_token"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 1, "router": "switch"}, 1),
        ({"router": "expert_choice", "capacity_factor": 1.5}, 1.5),
        ({"router": "soft"}, 4),
    ],
)
def test_experts_per_token(options, per_token):
    moe = layer(**options)
    size = model_size(nn.ModuleDict({"moe": moe}))
    router = sum(p.numel() for p in moe.router.parameters())
    assert size.dense == router
    assert size.total == router + 4 * EXPERT
    assert size.active == router + round(per_token * EXPERT)
    assert size.layers["moe"].experts_per_token == per_token


def test_shared_experts_and_tables():
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(10, 8),
            "tied": nn.Embedding(10, 8),
            "readout": nn.Linear(8, 10, bias=False),
            "moe": layer(top_k=2, shared_expert=32),
        }
    )
    model["readout"].weight = model["tied"].weight
    size = model_size(model)
    assert size.lookups == 80  # what is multiplied by, too, is none
    assert size.dense == 160 + 4 * 8 + 3 * 8 * 32
    assert size.total == sum(p.numel() for p in model.parameters())


def test_experts_that_differ():
    experts = [nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Identity()]
    size = model_size(nn.ModuleDict({"moe": MoE(8, expert=experts, top_k=1)}))
    assert size.total == 3 * 8 + 72 + 64
    assert size.layers["moe"].parameters_per_expert == pytest.approx(136 / 3)
    assert size.active == 3 * 8 + round(136 / 3)
