"""Adapters of MoE layers against experts whose weights have them merged in, in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_fastmoe import MoE, SparseUpdate
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import add_lora, merge_lora
from lightning_fastmoe.nn.expert_layers import expert_layers

D, F, E, RANK, ALPHA = 8, 12, 5, 3, 4.5
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"activation": "relu"},
    {"activation": "clamped_swiglu", "bias": True},
    {"shared_expert": 6, "capacity_factor": 2.0},
]


def make(**options: Any) -> nn.Sequential:
    torch.manual_seed(1)

    return nn.Sequential(nn.Linear(D, D), MoE(D, F, E, 2, **options)).double()


def stir(model: nn.Module) -> dict[str, nn.Parameter]:
    """Gives B values, so that all gradients matter; returns the adapters."""
    torch.manual_seed(2)
    found = {n: p for n, p in model.named_parameters() if "_lora_" in n}
    for name, parameter in found.items():
        if name.endswith("_b"):
            nn.init.normal_(parameter, std=0.3)
    return found


def merged_by_hand(model: nn.Module, adapters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {}
    for name in ("1.experts.up_proj", "1.experts.down_proj"):
        a, b = adapters[f"{name}_lora_a"], adapters[f"{name}_lora_b"]
        added = torch.stack([ALPHA / RANK * (y @ x) for x, y in zip(a, b, strict=True)])
        found[name] = model.get_parameter(name).detach() + added
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_gradients_are_those_of_merged_weights(options):
    model, twin = make(**dict(options)), make(**dict(options))
    twin.requires_grad_(False)  # as adapters leave theirs, so that balancing losses count in both
    names = add_lora(model, RANK, ALPHA)
    assert names == [f"1.experts.{w}_proj_lora_{p}" for w in ("up", "down") for p in "ab"]
    adapters = stir(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    got = model(x)
    want = functional_call(twin, merged_by_hand(twin, adapters), (x,))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(want)
    leaves = [x, *adapters.values()]
    found = torch.autograd.grad(got, leaves, upstream)
    for a, b in zip(found, torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        assert b.abs().sum() > 0
    assert merge_lora(model) == 1
    torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-11)
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert merge_lora(model) == 0


def test_a_new_adapter_changes_nothing_and_trains_what_is_named():
    model = make()
    x = torch.randn(7, D, dtype=torch.float64)
    before = model(x)
    names = add_lora(model, 4, also_train=["router.weight"])
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*names, "1.router.weight"}
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_one_seed_gives_each_expert_its_adapter():
    """Whichever other experts the rank holds; and state dicts of all experts load by global id."""
    kept, states = [], []
    for ids in (range(E), (1, 4)):
        model = make()
        for _, layer in expert_layers(model):
            layer.experts.keep(ids)
        torch.manual_seed(3)
        add_lora(model, 4)
        kept.append(model[1].experts.up_proj_lora_a.detach().clone())
        states.append(model)
    assert torch.equal(kept[0][[1, 4]], kept[1])
    stir(states[0])
    states[1].load_state_dict(states[0].state_dict())
    assert torch.equal(
        states[1][1].experts.down_proj_lora_b, states[0][1].experts.down_proj_lora_b[[1, 4]]
    )
    sharded = copy.deepcopy(states[0])
    sharded[1].experts.keep((1, 4))
    assert torch.equal(sharded[1].experts.up_proj_lora_a, kept[1])


def test_compiled():
    model = make().float()
    add_lora(model, 4)
    stir(model)
    x = torch.randn(6, D)
    want = model(x)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="its experts have adapters"):
        whole(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), want)


def test_what_can_not_be_is_refused():
    with pytest.raises(ConfigError, match="Linear.*there is no MoE layer"):
        add_lora(nn.Linear(2, 2), 4)
    model = make()
    for arguments, reason in (
        ({"rank": 0}, "rank=0 must be"),
        ({"rank": 2, "alpha": -1}, "alpha=-1 must be"),
        ({"rank": 2, "also_train": ["no.such"]}, "'no.such', which fits no parameter"),
    ):
        with pytest.raises(ConfigError, match=reason):
            add_lora(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())
    add_lora(model, 2)
    with pytest.raises(ConfigError, match=r"1\.experts has adapters already"):
        add_lora(model, 2)
    with pytest.raises(ConfigError, match=r"have adapters\. Train adapters or single experts"):
        SparseUpdate(experts=[0]).apply(model.requires_grad_(True))
    model = make()
    SparseUpdate(experts=[0]).apply(model)
    with pytest.raises(ConfigError, match="single experts of 1.experts"):
        add_lora(model, 2)
    model = nn.Sequential(MoE(D, F, E, 1, expert=lambda d, f: nn.Linear(d, d)))
    with pytest.raises(ConfigError, match=r"0\.experts are modules"):
        add_lora(model, 2)
