"""Experts of one's own: any modules, structures of tensors, placement by global id."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.nn import LocalDispatcher, ModuleExperts, MoE
from lightning_fastmoe.nn.placement import Placement, expert_placement
from lightning_fastmoe.nn.router import ROUTERS

D, E = 5, 4


class FFN(nn.Module):
    def __init__(self, d_model, d_ffn=7):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def make(expert=FFN, d_ffn=7, experts=E, seed=0, **kwargs):
    torch.manual_seed(seed)
    off = {"load_balancing": 0, "z_loss": 0} if kwargs.get("router", "softmax") == "softmax" else {}
    return MoE(D, d_ffn, experts, expert=expert, **{**off, **kwargs}).double()


def by_hand(layer, x):
    """Every expert on every token, then the weighted sum."""
    routing = layer.router(x)
    total = 0
    for k in range(routing.expert_ids.shape[1]):
        for e in range(layer.num_experts):
            y = layer.experts.get_submodule(str(e))(x)
            mine = (routing.expert_ids[:, k] == e).unsqueeze(1)
            total = total + mine * routing.weights[:, k : k + 1] * y
    return total


def assert_equals_by_hand(layer, x):
    got, want = layer(x), by_hand(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_by_class_path():
    """As a configuration file gives it."""
    a, b = make("nn.test_module_experts.FFN"), make(FFN)
    for name, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], value), name


def tokens(n=9):
    torch.manual_seed(1)
    return torch.randn(n, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "expert",
    [
        FFN,
        lambda d, f: nn.Sequential(nn.Linear(d, f), nn.GELU(), nn.Linear(f, d)),
        [FFN(D, 3), nn.Linear(D, D), nn.Sequential(nn.LayerNorm(D), FFN(D, 2)), FFN(D, 9)],
        nn.ModuleList([FFN(D, 3), nn.Linear(D, D), FFN(D, 2), FFN(D, 9)]),
    ],
    ids=["class", "function", "list", "ModuleList"],
)
def test_equals_each_expert_by_hand(expert):
    assert_equals_by_hand(make(expert), tokens())


def test_a_factory_gets_only_d_model_without_d_ffn():
    layer = make(FFN, d_ffn=None)
    assert layer.experts.get_submodule("0").up.weight.shape == (7, D)
    assert_equals_by_hand(layer, tokens())


def test_a_list_counts_the_experts():
    layer = MoE(D, expert=[nn.Linear(D, D) for _ in range(3)])
    assert layer.num_experts == 3


def test_stacked_ffns_equal_the_same_ffns_as_modules():
    torch.manual_seed(0)
    stacked = MoE(D, 7, E, activation="gelu", bias=True).double()
    layer = make(lambda d, f: nn.Sequential(nn.Linear(d, f), nn.GELU(), nn.Linear(f, d)))
    with torch.no_grad():
        layer.router.weight.copy_(stacked.router.weight)
        for e in range(E):
            up, _, down = layer.experts.get_submodule(str(e))
            up.weight.copy_(stacked.experts.up_proj[e])
            down.weight.copy_(stacked.experts.down_proj[e])
            up.bias.copy_(stacked.experts.up_bias[e].normal_())
            down.bias.copy_(stacked.experts.down_bias[e].normal_())
    x = tokens()
    torch.testing.assert_close(layer(x), stacked(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("how", ["built", "kept"])
def test_an_expert_starts_the_same_on_any_topology(ranks, how):
    whole = make()
    after = torch.rand(3)  # the generator itself advances equally, too
    for rank in range(ranks):
        each = E // ranks
        if how == "built":
            with expert_placement(
                lambda _, r=rank, n=each: Placement(tuple(range(r * n, r * n + n)))
            ):
                part = make()
            assert torch.equal(torch.rand(3), after)
        else:
            part = make()
            part.experts.keep(range(rank * each, (rank + 1) * each))
        assert part.num_local_experts == each
        assert part.is_sharded is (ranks > 1)
        state = whole.state_dict()
        for name, value in part.state_dict().items():
            assert torch.equal(value, state[name]), name
        names = {name.split(".")[1] for name, _ in part.named_parameters() if "experts" in name}
        assert names == {str(i) for i in range(rank * each, (rank + 1) * each)}


def test_experts_start_differently():
    a, b = make().experts.get_submodule("0"), make().experts.get_submodule("1")
    assert not torch.equal(a.up.weight, b.up.weight)


def test_the_whole_loads_into_a_slice():
    whole, part = make(seed=0), make(seed=1)
    part.experts.keep((2, 3))
    state = whole.state_dict()
    part.load_state_dict(state)
    assert len(state) == len(whole.state_dict())
    assert torch.equal(
        part.experts.get_submodule("3").up.weight, whole.experts.get_submodule("3").up.weight
    )
    del state["experts.2.up.weight"]
    with pytest.raises(RuntimeError, match="experts.2.up.weight"):
        part.load_state_dict(state)


def test_every_parameter_gets_a_gradient_even_without_tokens():
    layer = make()
    with torch.no_grad():
        layer.router.weight.zero_()  # experts 0 and 1 get everything
    layer(tokens()).square().sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) is (int(name[0]) < 2), name


class Pair(nn.Module):
    """Takes (vectors, grids, flags): vectors plus the grid's mean where the flag says so."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, inputs):
        x, grid, number, flag = inputs
        y = self.linear(x) + grid.mean(dim=(1, 2)).unsqueeze(1) * flag.unsqueeze(1)
        return {"y": y, "grid": grid * number.view(-1, 1, 1)}


class Named(NamedTuple):
    x: torch.Tensor
    grid: torch.Tensor
    number: torch.Tensor
    flag: torch.Tensor


@pytest.mark.parametrize("kind", [tuple, list, Named._make])
@pytest.mark.parametrize("factor", [None, 0.6])
def test_structures_of_tensors(kind, factor):
    layer, x = make(Pair, d_ffn=None, capacity_factor=factor), tokens()
    grid = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    number, flag = torch.arange(9), torch.rand(9) < 0.5
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    got = layer(kind([x, grid, number, flag]))
    routing = layer.router(x)
    kept = torch.ones_like(routing.weights) if factor is None else seen[0].kept
    want_y, want_grid = 0, 0
    for k in range(2):
        weights = routing.weights[:, k] * kept[:, k]
        for e in range(E):
            out = layer.experts.get_submodule(str(e))((x, grid, number, flag))
            mine = weights * (routing.expert_ids[:, k] == e)
            want_y = want_y + mine.unsqueeze(1) * out["y"]
            want_grid = want_grid + mine.view(-1, 1, 1) * out["grid"]
    assert got.keys() == {"y", "grid"}
    torch.testing.assert_close(got["y"], want_y)
    torch.testing.assert_close(got["grid"], want_grid)
    leaves = [x, grid, *layer.parameters()]
    loss, want = (
        o["y"].square().sum() + o["grid"].sum() for o in (got, {"y": want_y, "grid": want_grid})
    )
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_dict_and_its_losses():
    class Sum(nn.Module):
        def forward(self, inputs):
            return inputs["a"] + inputs["b"]

    layer = MoE(D, num_experts=E, expert=lambda d: Sum(), z_loss=0.5).double()
    x = {"a": tokens(), "b": tokens() * 2}
    (layer(x).sum() * 0).backward()
    assert layer.router.weight.grad.any()


def test_without_tokens_outputs_keep_their_shapes():
    layer = make(Pair, d_ffn=None)
    inputs = (torch.zeros(0, D).double(), torch.zeros(0, 2, 2).double(), *[torch.zeros(0)] * 2)
    got = layer(inputs)
    assert got["y"].shape == (0, D)
    assert got["grid"].shape == (0, 2, 2)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_runs_modules(router):
    """As the stacked experts do with the same weights."""
    torch.manual_seed(0)
    stacked = MoE(D, 7, E, activation="gelu", router=router).double()
    torch.manual_seed(0)
    layer = MoE(
        D,
        7,
        E,
        router=router,
        expert=lambda d, f: nn.Sequential(
            nn.Linear(d, f, bias=False), nn.GELU(), nn.Linear(f, d, bias=False)
        ),
    ).double()
    with torch.no_grad():
        for e in range(E):
            layer.experts.get_submodule(str(e))[0].weight.copy_(stacked.experts.up_proj[e])
            layer.experts.get_submodule(str(e))[2].weight.copy_(stacked.experts.down_proj[e])
    layer.router.load_state_dict(stacked.router.state_dict())
    x, ids = tokens(), torch.arange(9)
    got, want = layer(x, token_ids=ids), stacked(x, token_ids=ids)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), [x, *layer.router.parameters()], allow_unused=True),
        torch.autograd.grad(
            want.square().sum(), [x, *stacked.router.parameters()], allow_unused=True
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_bf16_and_autocast():
    layer = make().float()
    x = torch.randn(9, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"expert": nn.Linear(D, D)}, "expert= is one Linear.*its class"),
        ({"expert": [nn.Linear(D, D)] * 3}, "lists 3 modules, but num_experts=4"),
        ({"expert": "FFN"}, "expert='FFN' is unknown. It must be a module, a class"),
        ({"expert": "nn.test_module_experts.FNN"}, "has no attribute 'FNN'"),
        ({"expert": "nn.test_module_experts.D"}, "expert='nn.test_module_experts.D' is a int"),
        ({"expert": [nn.Linear(D, D)] * 4}, "same module for expert 1"),
        ({"expert": lambda d, f: "no module"}, "gave a str for expert 0"),
        ({"expert": None, "d_ffn": None}, "d_ffn=None is invalid"),
        ({"expert": FFN, "experts": None}, "num_experts=None is invalid"),
        ({"expert": lambda d: FFN(d)}, r"can't be called with \(5, 7\)"),
        ({"shared_expert_gate": True}, "none to gate"),
        ({"shared_expert": 0}, "shared_expert=0 is invalid"),
    ],
)
def test_what_cannot_be_an_expert_is_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make(**kwargs)


def test_outputs_of_another_length_are_refused():
    with pytest.raises(ShapeError, match=r"Expert 0 got \d+ tokens and returned"):
        make(lambda d, f: nn.Flatten(0))(tokens())


def test_outputs_of_another_structure_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ShapeError, match="Expert 2 returned a different structure than expert 0"):
        make([nn.Identity(), nn.Identity(), Two(), nn.Identity()])(tokens())


def test_integers_can_not_be_summed_with_weights():
    class Integers(nn.Module):
        def forward(self, x):
            return x.long()

    with pytest.raises(ShapeError, match="torch.int64.*floating"):
        MoE(D, num_experts=E, expert=lambda d: Integers())(torch.randn(3, D))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(3)), r"first tensor is not \(T, 5\)"),
        ((), "first tensor is not"),
        ((torch.zeros(3, D), torch.zeros(4)), "different lengths.*3 tokens"),
        ({"x": torch.zeros(3, D), "n": 7}, "different lengths.*7"),
    ],
)
def test_refused_structures(inputs, message):
    with pytest.raises(ShapeError, match=message):
        make(Pair, d_ffn=None)(inputs)


def test_structures_need_experts_that_take_them():
    with pytest.raises(ConfigError, match="its experts are FFNs"):
        MoE(D, 7, E)((torch.zeros(3, D), torch.zeros(3)))
    with pytest.raises(ConfigError, match="soft routing mixes"):
        MoE(D, num_experts=E, expert=Pair, router="soft")((torch.zeros(3, D), torch.zeros(3)))
    layer = make(Pair, d_ffn=None, shared_expert=3)
    inputs = (torch.zeros(2, D).double(), torch.zeros(2, 1, 1).double(), *[torch.zeros(2)] * 2)
    with pytest.raises(ConfigError, match="shared_expert adds to one tensor"):
        layer(inputs)


def test_dispatchers_send_integers_whole():
    layer = make()
    routing = layer.router(tokens())
    for chosen in (routing, routing._replace(kept=torch.rand(9, 2) < 0.7)):
        numbers = torch.arange(9).unsqueeze(1) * 2**40
        _, counts, handle = LocalDispatcher(E).dispatch(tokens(), chosen, "MoE")
        sent = LocalDispatcher(E).send(numbers, handle)
        assert sent.dtype == torch.int64
        assert len(sent) == int(counts.sum())
        kept = chosen.kept if chosen.kept is not None else torch.ones(9, 2, dtype=torch.bool)
        want = [t * 2**40 for e in range(E) for t in range(9) for k in range(2)
                if int(chosen.expert_ids[t, k]) == e and kept[t, k]]  # fmt: skip
        assert sent.flatten().tolist() == want


def test_a_device_gets_the_numbers_of_the_cpu(monkeypatch):
    """All ranks seed their GPUs' generators the same, which would clone experts across ranks."""
    on_cpu = ModuleExperts(FFN, (D, 7), E, [1, 2], layer_seed=5)
    gpu, moved = SimpleNamespace(type="cuda"), []
    monkeypatch.setattr(torch, "get_default_device", lambda: gpu)
    monkeypatch.setattr(FFN, "to", lambda expert, device: moved.append(device) or expert)
    with torch.device("meta"):  # what a factory would draw on is not the CPU
        on_gpu = ModuleExperts(FFN, (D, 7), E, [1, 2], layer_seed=5)
    assert moved == [gpu, gpu]
    for mine, right in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(mine, right)
