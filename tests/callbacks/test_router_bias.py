"""The balance bias: how it moves, what it is made of, and who refuses."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe import MoE, RouterBiasBalancing
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router import SigmoidTopKRouter

D, E = 6, 4


def make(**kwargs):
    torch.manual_seed(0)
    return MoE(D, 8, E, 2, router="sigmoid", load_balancing=0, **kwargs)


def balancing(*layers, rate=0.25):
    callback = RouterBiasBalancing(rate)
    callback._routers = [layer.router for layer in layers]
    return callback


def test_moves_by_a_fixed_rate_against_the_error():
    layer, other = make(), MoE(D, 8, 2, 1, router="sigmoid", load_balancing=0)
    callback = balancing(layer, other)
    layer.router.load_since_update.copy_(torch.tensor([8, 1, 4, 3]))
    other.router.load_since_update.copy_(torch.tensor([5, 7]))
    callback.move()
    assert layer.router.balance_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    assert other.router.balance_bias.tolist() == [0.25, -0.25]
    callback.move()  # nothing was routed since
    assert layer.router.balance_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]


def test_counts_training_passes_alone_and_once():
    layer, x = make(capacity_factor=0.5), torch.randn(8, D, requires_grad=True)
    counts = torch.zeros(E, dtype=torch.int64)
    layer.register_routing_observer(
        lambda observed, routing: counts.add_(routing.routed_counts() * observed.training)
    )
    layer(x)
    layer.eval()(x)
    layer.train()
    for use_reentrant in (False, True):
        checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    layer(x, mask=torch.arange(8) < 6)
    assert torch.equal(layer.router.load_since_update, counts)
    assert int(counts.sum()) == 2 * (3 * 8 + 2)


def test_evens_out_the_loads():
    layer, x = make(), torch.randn(512, D) + torch.linspace(0, 1, D)
    callback = balancing(layer, rate=0.003)
    spreads = []
    for _ in range(150):
        with torch.no_grad():
            layer(x)
        loads = layer.router.load_since_update.double()
        spreads.append(float(loads.std() / loads.mean()))
        callback.move()
    assert spreads[0] > 0.15
    assert max(spreads[-10:]) < 0.05


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_the_bias_stays_fp32(cast):
    """0.001 is lost on a bf16 bias above 0.5."""
    layer = make()
    layer.router.balance_bias.fill_(0.501)
    getattr(layer, cast)()
    bias = layer.router.balance_bias
    assert bias.dtype == torch.float32
    assert bias[0].item() == torch.tensor(0.501).item()
    assert layer.router.weight.dtype == getattr(torch, cast)
    assert "balance_bias" in dict(layer.router.named_buffers())


def test_the_state_dict_holds_the_bias_and_not_the_counts():
    layer, other = make(), make()
    layer.router.balance_bias.normal_()
    layer(torch.randn(5, D))
    state = layer.state_dict()
    assert "router.balance_bias" in state
    assert not any("load_since_update" in name for name in state)
    other.load_state_dict(state)
    assert torch.equal(other.router.balance_bias, layer.router.balance_bias)
    assert torch.equal(copy.deepcopy(layer).router.balance_bias, layer.router.balance_bias)


def test_the_bias_gets_no_gradient():
    layer = make()
    layer(torch.randn(5, D)).sum().backward()
    assert layer.router.balance_bias.grad is None
    assert "balance_bias" not in dict(layer.router.named_parameters())


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_refused_rates(rate):
    with pytest.raises(ConfigError, match="rate="):
        RouterBiasBalancing(rate)


def test_needs_a_router_with_a_bias():
    module = pl.LightningModule()
    module.net = nn.ModuleList(
        [MoE(D, 8, E), MoE(D, 8, E, router=SigmoidTopKRouter(D, E, 2, balance_bias=False))]
    )
    with pytest.raises(ConfigError, match="no router with a balance bias"):
        RouterBiasBalancing().on_fit_start(pl.Trainer(logger=False, barebones=True), module)
