"""A small language model learns with each router and loss, and no expert dies unseen."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from lightning_fastmoe import RouterBiasBalancing, moe_losses
from lightning_fastmoe.demos.byte_lm import MoELanguageModel
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.metrics import ExpertLoad
from lightning_fastmoe.nn import CausalityWarning, moe_layers
from lightning_fastmoe.nn.router import ROUTERS
from lightning_fastmoe.nn.router.losses import LOSSES, TOKEN_CHOICE_LOSSES

STEPS, WINDOW, BATCH, EXPERTS = 50, 33, 8, 4

NONE = {"load_balancing": 0.0, "z_loss": 0.0}
RUNS = {
    **{name: {"router": name} for name in ROUTERS},
    "no loss": NONE,
    "balance bias": {**NONE, "moe": {"router_options": {"balance_bias": True}}},
    **{
        name: {**NONE, "moe": {name: LOSSES[name].coefficient or 0.01}}
        for name in sorted(TOKEN_CHOICE_LOSSES - NONE.keys())
    },
    "capacity": {"moe": {"capacity_factor": 1.0}},
    "clamped, shared": {"moe": {"activation": "clamped_swiglu", "shared_expert": 16}},
}


def batches() -> torch.Tensor:
    """(STEPS, BATCH, WINDOW) bytes of Python source."""
    text = Path(textwrap.__file__).read_bytes()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(data) - WINDOW, (STEPS, BATCH), generator=generator)
    return data[starts.unsqueeze(-1) + torch.arange(WINDOW)]


def build(**arguments) -> MoELanguageModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ffn": 32, "num_experts": EXPERTS}
    top_k = None if arguments.get("router", "softmax") != "softmax" else 2
    model = MoELanguageModel(**sizes, top_k=top_k, init_std=0.06, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CausalityWarning)
        model.configure_model()
    return model


@pytest.mark.parametrize("name", RUNS)
def test_learns_and_no_expert_dies_unseen(name):
    model = build(**RUNS[name])
    layers = [layer for _, layer in moe_layers(model)]
    metric = ExpertLoad([EXPERTS] * 2, ["0", "1"])
    late = torch.zeros(2, EXPERTS, dtype=torch.int64)
    losses: list[float] = []

    def watch(index, layer):
        def observe(_, routing):
            if len(losses) >= STEPS - 10:
                metric.update(index, routing)
                late[index] += routing.routed_counts()

        layer.register_routing_observer(observe)

    for index, layer in enumerate(layers):
        watch(index, layer)
    balancing = RouterBiasBalancing(0.01) if name in ("balance bias", "sigmoid") else None
    if balancing:
        balancing._routers = [layer.router for layer in layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches():
        loss = model._nats_per_byte(batch).mean()
        terms = moe_losses(model)
        assert set(terms) <= set(layers[0].loss_coefficients)
        optimizer.zero_grad()
        (loss + sum(terms.values())).backward()
        optimizer.step()
        if balancing:
            balancing.move()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.75 * first, f"{first:.2f} -> {last:.2f}"
    values = metric.compute()
    for index in range(2):
        dead = int((late[index] == 0).sum())
        assert int(values[f"{index}/dead_experts"]) == dead
        ratio = late[index].max() / late[index].double().mean()
        assert float(values[f"{index}/max_load"]) == pytest.approx(float(ratio), rel=1e-5)
        assert dead == 0, f"layer {index}: {late[index].tolist()}"


def test_a_dead_expert_is_reported():
    model = build(**NONE)
    layer = model.network.blocks[0].moe
    with torch.no_grad():
        layer.router.weight.zero_()
    metric = ExpertLoad([EXPERTS], ["0"])
    layer.register_routing_observer(lambda _, routing: metric.update(0, routing))
    model(batches()[0, :, :-1])
    assert int(metric.compute()["0/dead_experts"]) == 2


def test_what_is_not_causal_warns_in_the_language_model():
    model = MoELanguageModel(num_experts=EXPERTS, num_layers=1, router="soft", top_k=None)
    with pytest.warns(CausalityWarning, match="SoftRouter is not causal"):
        model.configure_model()


def test_unknown_arguments_of_the_layers_are_refused():
    model = MoELanguageModel(moe={"capacity": 1.0, "router": "soft"})
    with pytest.raises(ConfigError, match=r"model.moe has capacity, router; .*capacity_factor"):
        model.configure_model()
