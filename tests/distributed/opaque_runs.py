"""What the ranks run in test_opaque.py, and on GPUs in its twin."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import shutil
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from distributed.devices import join
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe.distributed import ExpertSharder, make_expert_mesh
from lightning_fastmoe.distributed.each_rank import run_on_each_rank
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, Routing, opaque, trace_layers
from lightning_fastmoe.ops.layer_call import Wanted
from lightning_fastmoe.strategy.rank_zero import run_on_rank_zero

expert_layer = importlib.import_module("lightning_fastmoe.ops.expert_layer")  # not its function

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)

D, E = 8, 8

SETTINGS: dict[str, dict[str, Any]] = {
    "biases, one slot": {"bias": True, "activation": "gelu", "top_k": 1},
    "balancing by biases": {"router": "sigmoid", "router_options": {"balance_bias": True}},
    "a shared expert": {"shared_expert": 8, "shared_expert_gate": True},
    "dropped slots": {"capacity_factor": 0.6},
}


class Block(nn.Module):
    """A layer between others, which a compiler may fuse with its router."""

    def __init__(self, width: int = D, **moe: Any) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, width)
        self.moe = MoE(width, 2 * width, E, **{"load_balancing": 0.3, "z_loss": 0.2, **moe})

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., D)`` -> (..., D)."""
        y: Tensor = self.head(torch.tanh(self.moe(self.norm(x))) + x)
        return y


class Pair:
    """A model of two blocks whose experts are sharded, and the same with compiled blocks."""

    def __init__(
        self,
        device_type: str = "cpu",
        backend: str = "aot_eager",
        dtype: torch.dtype = torch.float64,
        frozen: str | None = None,
        is_sharded: bool = True,
        **moe: Any,
    ) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.device, group = join(device_type)
        self.rank, self.dtype = group.rank, dtype
        mesh = make_expert_mesh(group.size if is_sharded else 1, device_type)
        self.models = [self._model(mesh, frozen, moe) for _ in range(2)]
        for block in self.models[0]:
            block.compile(backend=backend, fullgraph=True)

    def _model(self, mesh: Any, frozen: str | None, moe: dict[str, Any]) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(*(Block(**moe) for _ in range(2))).to(self.device, self.dtype)
        if frozen is not None:
            for block in model:
                block.moe.get_submodule(frozen).requires_grad_(False)
        ExpertSharder(mesh).shard(model)
        assert all(block.moe.is_sharded == (mesh.ep_size > 1) for block in model)
        return model

    def batch(self, tokens: int) -> Tensor:
        """Of this rank, with another number of tokens on each."""
        generator = torch.Generator().manual_seed(10 * tokens + self.rank)
        n = max(tokens - 2 * self.rank, 0)
        width = self.models[0][0].moe.d_model
        x = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
        x = x.to(self.device, self.dtype)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        return x.requires_grad_()

    def both(self, tokens: int, step: Callable[..., Tensor] | None = None) -> dict[str, Any]:
        """Name -> what the compiled model computes in a pass, and what the other does."""
        found = [self._pass(model, self.batch(tokens), step) for model in self.models]
        assert found[0].keys() == found[1].keys()
        return {name: (found[0][name], found[1][name]) for name in found[0]}

    def _pass(
        self, model: nn.Sequential, x: Tensor, step: Callable[..., Tensor] | None
    ) -> dict[str, Tensor | None]:
        model.zero_grad()
        y = x
        for block in model:
            y = block(y) if step is None else step(block, y)
        loss = y.square().sum()
        for block in model:
            block.moe.loss_scale.watch(loss)
        (loss * 4).backward()
        found: dict[str, Tensor | None] = {"output": y.detach(), "input's": x.grad}
        for name, p in model.named_parameters():
            found[name] = p.grad
        for i, block in enumerate(model):
            found |= {f"{i}: {name}": value for name, value in block.moe.last_losses.items()}
            load = getattr(block.moe.router, "load_since_update", None)
            if load is not None:
                found[f"{i}: load"] = load
        return {k: None if v is None else v.detach().cpu().clone() for k, v in found.items()}


def compared(
    settings: dict[str, Any],
    device_type: str = "cpu",
    backend: str = "aot_eager",
    dtype: torch.dtype = torch.float64,
    frozen: str | None = None,
    sizes: tuple[int, ...] = (5, 6, 11, 2),
) -> tuple[list[dict[str, Any]], int, int]:
    """What :meth:`Pair.both` says of batches, the number of graphs, and of passes that are kept."""
    pair = Pair(device_type, backend, dtype, frozen, **settings)
    found = [pair.both(tokens) for tokens in sizes]
    graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for model in pair.models:
            model.eval()
        x = pair.batch(7)
        outputs = [model(x).cpu() for model in pair.models]
    gc.collect()
    return [*found, {"evaluation": tuple(outputs)}], graphs, len(opaque._Pass._alive)


def by_hand(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """:func:`compared` where autograd may not record a pass."""
    with mock.patch.object(opaque, "_run", side_effect=AssertionError("recorded by autograd")):
        return compared(settings)[0]


def on_each_rank() -> list[tuple[Tensor, Tensor]]:
    """Outputs of a model and of one with compiled blocks, which rank 0 runs twice and rank 1 once.

    A graph that exists doesn't see the hooks by which ranks tell each other where they are.
    """
    pair = Pair()
    for model in pair.models:
        model.eval()
        with torch.no_grad():
            model(pair.batch(5))
    found = []
    for model in pair.models:
        layers = {f"{i}": block.moe for i, block in enumerate(model)}

        def passes(model: nn.Module = model) -> list[Tensor]:
            return [model(pair.batch(tokens)).clone() for tokens in (5, 6)[: 2 - pair.rank]]

        found.append(run_on_each_rank(model, layers, lambda: None, pair.device, passes))
    return list(zip(*found, strict=True))


def on_rank_zero() -> list[tuple[Tensor, Tensor]]:
    """The same on rank 0 alone."""
    pair = Pair()
    for model in pair.models:
        model.eval()
        with torch.no_grad():
            model(pair.batch(5))
    found: list[list[Tensor]] = []
    for model in pair.models:
        layers = {f"{i}": block.moe for i, block in enumerate(model)}

        def passes(model: nn.Module = model) -> list[Tensor]:
            return [model(pair.batch(tokens)).clone() for tokens in (5, 6)]

        found.append(run_on_rank_zero(model, layers, lambda: None, passes) or [])
    return list(zip(*found, strict=True))


def hooks_of_experts() -> list[int]:
    """How often backward hooks on the experts of each model's layers run."""
    pair, calls = Pair(dispatcher="symmetric"), [0, 0]

    def count(i: int) -> None:
        calls[i] += 1

    for i, model in enumerate(pair.models):
        for block in model:
            block.moe.experts.register_full_backward_hook(lambda *_, i=i: count(i))
    pair.both(5)
    return calls


def observed(is_sharded: bool) -> tuple[list[dict[str, tuple[Tensor, Tensor]]], int, int]:
    """What observers see of each pass and layer, the last one replayed, too; breaks, and graphs."""
    pair = Pair(router="sigmoid", capacity_factor=0.6, is_sharded=is_sharded)
    seen: list[list[tuple[str, Routing]]] = [[], []]
    for model, found in zip(pair.models, seen, strict=True):
        for block in model:
            block.moe.register_routing_observer(
                lambda layer, routing, found=found: found.append((layer.layer_name, routing))
            )

    def step(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    for tokens in (5, 11):
        pair.both(tokens)
    graphs = counters["stats"]["unique_graphs"]
    pair.both(6, step)
    passes = []
    for (name, one), (other, two) in zip(*seen, strict=True):
        assert name == other
        assert not any(t.requires_grad for t in one if isinstance(t, Tensor))
        fields = {
            field: (getattr(one, field), getattr(two, field).detach())
            for field in ("logits", "scores", "weights", "expert_ids", "kept")
        }
        counts = one.routed_counts(), two.routed_counts()
        passes.append({**fields, "routed": counts, "dropped": _dropped(one, two)})
    return passes, len(counters["graph_break"]), graphs


def _dropped(*routings: Routing) -> tuple[Tensor, ...]:
    return tuple(routing.dropped_counts() for routing in routings)


def replayed(reentrant: bool) -> list[dict[str, Any]]:
    """With activation checkpointing around compiled blocks."""
    pair = Pair(router="sigmoid", router_options={"balance_bias": True})

    def step(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    return [pair.both(tokens, step) for tokens in (5, 6)]


def twice_and_never() -> tuple[dict[str, tuple[Tensor, Tensor]], int, int]:
    """Gradients of two backward passes and of one; passes that are kept with a graph, and without.

    And those of a layer that is called twice with the same input, which compilers call once.
    """
    # With donated buffers, AOT Autograd itself refuses retain_graph=True.
    with torch._functorch.config.patch(donated_buffer=False):
        pair = Pair()
        y = pair.models[0](pair.batch(5))
        kept = len(opaque._Pass._alive)
        del y
        dropped = len(opaque._Pass._alive)
        found = {}
        for model, times in zip(pair.models, (2, 2), strict=True):
            model.zero_grad()
            loss = model(pair.batch(5)).square().sum()
            for _ in range(times):
                loss.backward(retain_graph=True)
        for (name, p), q in zip(
            pair.models[0].named_parameters(), pair.models[1].parameters(), strict=True
        ):
            found[name] = p.grad.clone(), q.grad.clone()
    del loss
    torch._dynamo.reset()
    doubled: list[Tensor] = []
    for model, compiles in zip(pair.models, (True, False), strict=True):
        moe = model[0].moe

        def views(x: Tensor, moe: MoE = moe) -> Tensor:
            return moe(x) + torch.tanh(moe(x)) * 2

        run = torch.compile(views, backend="aot_eager", fullgraph=True) if compiles else views
        model.zero_grad()
        run(pair.batch(6)).square().sum().backward()
        doubled.append(moe.experts.up_proj.grad)
    found["called twice"] = doubled[0], doubled[1]
    return found, kept, dropped


Wants = list[tuple[bool, ...]]


def wanted() -> tuple[Wants, Wants]:
    """Which gradients experts that are frozen compute inside of a graph, and without one."""
    pair = Pair(frozen="experts")
    found: list[Wants] = []
    for model in pair.models:
        wants: Wants = []

        def noted(*flags: bool, wants: Wants = wants) -> Wanted:
            wants.append(flags[:4])
            return Wanted(*flags)

        with mock.patch.object(expert_layer, "Wanted", noted):
            model(pair.batch(6)).square().sum().backward()
        found.append(wants)
    return found[0], found[1]


def saving_memory() -> tuple[str, dict[str, Any], int]:
    """What is said where the compiler may run the exchange again; and a pass without fullgraph."""
    pair = Pair()
    said = "nothing"
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        try:
            pair.models[0](pair.batch(6))
        except Exception as error:
            said = str(error)
        torch._dynamo.reset()
        trace_layers(pair.models[0])
        for block in pair.models[0]:
            block.compile(backend="aot_eager")
        found = pair.both(6)
    return said, found, len(counters["graph_break"])


def copied() -> str:
    """What a copy says that a graph of the layer runs."""
    pair = Pair()
    layer = pair.models[0][0].moe
    reference = copy.deepcopy(layer.reference)
    layer.reference = reference
    try:
        pair.models[0](pair.batch(5))
    except ConfigError as error:
        return str(error)
    return "nothing"
