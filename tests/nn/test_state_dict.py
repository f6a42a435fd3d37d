from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.nn import MoE


def make(bias=True, activation="swiglu", seed=0):
    torch.manual_seed(seed)
    return MoE(5, 3, 4, bias=bias, activation=activation)


@pytest.mark.parametrize(("activation", "rows"), [("swiglu", 6), ("gelu", 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes(activation, rows, bias):
    want = {
        "router.weight": (4, 5),
        "experts.up_proj": (4, rows, 5),
        "experts.down_proj": (4, 5, 3),
    }
    if bias:
        want |= {"experts.up_bias": (4, rows), "experts.down_bias": (4, 5)}
    layer = make(bias, activation)
    state = layer.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == want
    assert set(state) == {name for name, _ in layer.named_parameters()}


def test_round_trip():
    layer, other, x = make(seed=0), make(seed=1), torch.randn(7, 5)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(("first", "count"), [(0, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("prefix", ["", "model.layer."])
def test_the_whole_loads_into_a_slice(first, count, prefix):
    whole, part = make(seed=0), make(seed=1)
    part.experts.keep(range(first, first + count))
    state = {prefix + name: value for name, value in whole.state_dict().items()}
    before = {name: value.shape for name, value in state.items()}
    target = part
    for name in reversed(prefix.split(".")[:-1]):
        target = torch.nn.ModuleDict({name: target})
    target.load_state_dict(state)
    for name, value in part.experts.named_parameters():
        full = whole.experts.get_parameter(name)
        assert torch.equal(value, full[first : first + count]), name
    assert torch.equal(part.router.weight, whole.router.weight)
    assert {name: value.shape for name, value in state.items()} == before  # the caller's is intact


def test_a_slice_loads_into_the_same_slice():
    a, b = make(seed=0), make(seed=1)
    for layer in (a, b):
        layer.experts.keep((2, 3))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.experts.up_proj, b.experts.up_proj)


def test_other_sizes_are_refused():
    part, whole = make(), make()
    part.experts.keep((0, 1))
    with pytest.raises(RuntimeError, match="size mismatch for experts.up_proj"):
        whole.load_state_dict(part.state_dict())
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="size mismatch for experts.up_proj"):
        part.load_state_dict(MoE(5, 3, 8, bias=True).state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*experts.up_bias"):
        make().load_state_dict(make(bias=False).state_dict())
