"""The peers that need PyTorch alone, this package's own layer, and the list of all peers."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layer.configs import Config
from layer.problem import LOAD_BALANCING, Z_LOSS, Problem, activate
from layer.router import add_losses, route


@dataclass
class Layer:
    """A peer's layer, ready to run on one problem.

    Attributes:
        forward: computes the output (T, D), with a graph.
        leaves: the tensors that get gradients, by the names of :class:`~layer.problem.Answers`.
            A list stands for one tensor per expert.
        reshape: turns a gradient into the layout of the problem, for leaves in a layout of the
            peer's own.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor | list[Tensor]]
    reshape: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def all_leaves(self) -> list[Tensor]:
        """The leaves, flat."""
        out: list[Tensor] = []
        for leaf in self.leaves.values():
            out.extend(leaf if isinstance(leaf, list) else [leaf])
        return out

    def forget_gradients(self) -> None:
        """Sets every gradient to None, so that the next step makes fresh ones."""
        for leaf in self.all_leaves():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step in the problem's layout."""
        found = {}
        for name, leaf in self.leaves.items():
            grad = torch.stack([_grad(p) for p in leaf]) if isinstance(leaf, list) else _grad(leaf)
            found[name] = self.reshape.get(name, lambda t: t)(grad)
        return found


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class Peer:
    """One implementation of the layer.

    Attributes:
        name: how the command line calls it.
        title: how the tables call it.
        note: what a reader must know to compare it.
        package: the distribution whose version is told, None for torch itself.
        with_router: whether it routes by itself, so that the answers are those with a router.
        compiles: whether the first step of a new shape may compile for a minute and more.
    """

    name: str
    title: str
    note = ""
    package: str | None = None
    with_router = False
    compiles = False

    def unavailable(self, config: Config | None, device: torch.device) -> str | None:
        """Why it can't run (``config`` None: any of them) in a few words, None if it can."""
        return None

    def start(self, device: torch.device) -> None:
        """Imports and loads what no configuration changes; the time it takes is told apart."""

    def build(self, problem: Problem) -> Layer:
        """The layer on ``problem``."""
        raise NotImplementedError

    def version(self) -> str:
        """Version of the package, or of torch."""
        try:
            return importlib.metadata.version(self.package or "torch")
        except importlib.metadata.PackageNotFoundError:
            return "(not installed, found on the path)"


def missing(*modules: str) -> str | None:
    """Why one of ``modules`` can't be imported, None if all can."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
            first = (str(error).splitlines() or [""])[0]
            return f"can't import {name}: {type(error).__name__}: {first}"[:160]
    return None


def leaf(tensor: Tensor) -> Tensor:
    """``tensor``'s memory as a leaf that gets a gradient."""
    return tensor.detach().requires_grad_()


def given_leaves(problem: Problem) -> dict[str, Any]:
    """Leaves of a layer that is given its routing."""
    return {name: leaf(getattr(problem, name)) for name in ("x", "weights", "up", "down")}


def routing_leaves(problem: Problem) -> dict[str, Any]:
    """Leaves of a layer that does its own routing."""
    return {name: leaf(getattr(problem, name)) for name in ("x", "router", "up", "down")}


def _sorted_pairs(expert_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted expert ids, the pairs in expert-major order, and the inverse."""
    ids, order = torch.sort(expert_ids.flatten(), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return ids, order, inverse


def _weighted_sum(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its rows."""
    rows = y[inverse].view(*weights.shape, -1)
    return (rows * weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)


def _weighted_sum_bmm(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """The same as a product of a (1, K) with a (K, D) matrix per token."""
    rows = y[inverse].view(*weights.shape, -1)
    return torch.bmm(weights.to(y.dtype).unsqueeze(1), rows).squeeze(1)


class PlainTorch(Peer):
    """What a good user of PyTorch writes: no kernels of one's own, no host sync.

    Rows are gathered by indexing: on an H100 the backward of index_select takes up to twice the
    time. Of the two ways to sum them, neither is the faster one at all sizes, so both are peers.
    """

    name = "torch"
    title = "plain torch"
    note = "sort, indexing, F.grouped_mm, activation, F.grouped_mm, indexing, product and sum"
    weighted_sum = staticmethod(_weighted_sum)

    def build(self, problem: Problem) -> Layer:
        leaves = given_leaves(problem)

        def forward() -> Tensor:
            x, weights, up, down = (leaves[n] for n in ("x", "weights", "up", "down"))
            return self.run_experts(problem.config, x, problem.expert_ids, weights, up, down)[0]

        return Layer(forward, leaves)

    def run_experts(
        self, config: Config, x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output (T, D), and where each expert's rows end, (E,) int32."""
        sorted_ids, order, inverse = _sorted_pairs(ids)
        experts = torch.arange(config.num_experts, device=x.device)
        ends = torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)
        rows = x[order // config.top_k]
        h = F.grouped_mm(rows, up.transpose(1, 2), offs=ends)
        del rows
        a = activate(h, config.activation)
        del h
        y = F.grouped_mm(a, down.transpose(1, 2), offs=ends)
        del a
        return self.weighted_sum(y, inverse, weights), ends


class PlainTorchRouter(PlainTorch):
    """Plain torch with a router: the baseline of the peers that do their own routing."""

    name = "torch-router"
    title = "plain torch, router"
    note = "as plain torch, behind a router of plain torch: product in fp32, softmax, top-k, losses"
    with_router = True

    def build(self, problem: Problem) -> Layer:
        leaves, config = routing_leaves(problem), problem.config

        def forward() -> Tensor:
            x, router, up, down = (leaves[n] for n in ("x", "router", "up", "down"))
            found = route(x, router, config.top_k)
            out, ends = self.run_experts(config, x, found.expert_ids, found.weights, up, down)
            return add_losses(out, found, ends.diff(prepend=ends.new_zeros(1)))

        return Layer(forward, leaves)


class PlainTorchBmm(PlainTorch):
    """Plain torch with a batched product for the weighted sum, which takes less memory."""

    name = "torch-bmm"
    title = "plain torch, bmm"
    note = "as plain torch, but torch.bmm instead of product and sum"
    weighted_sum = staticmethod(_weighted_sum_bmm)


class Loop(Peer):
    """One pair of products per expert; the counts are read on the host, once."""

    name = "loop"
    title = "loop over experts"
    note = "as plain torch, but two F.linear per expert instead of F.grouped_mm"

    def build(self, problem: Problem) -> Layer:
        leaves = given_leaves(problem)
        config = problem.config

        def forward() -> Tensor:
            x, weights, up, down = (leaves[n] for n in ("x", "weights", "up", "down"))
            ids, order, inverse = _sorted_pairs(problem.expert_ids)
            counts = torch.bincount(ids, minlength=config.num_experts).tolist()
            chunks = x[order // config.top_k].split(counts)
            matrices = zip(chunks, up.unbind(0), down.unbind(0), strict=True)
            y = [F.linear(activate(F.linear(c, u), config.activation), d) for c, u, d in matrices]
            return _weighted_sum(torch.cat(y), inverse, weights)

        return Layer(forward, leaves)


class Ours(Peer):
    """This package's layer from a given routing on: its sort, its kernels, its backward."""

    name = "ours"
    title = "lightning_fastmoe"
    note = "order_by_expert and expert_layer from the given ids and weights, with our own products"
    package = "lightning-fastmoe"
    own_products = True

    def unavailable(self, config: Config | None, device: torch.device) -> str | None:
        return missing("lightning_fastmoe.ops")

    def start(self, device: torch.device) -> None:
        from lightning_fastmoe.ops import native

        # Each peer has a process of its own.
        os.environ["LIGHTNING_FASTMOE_HOPPER"] = "1" if self.own_products else "0"
        if device.type == "cuda":
            native.load()

    def version(self) -> str:
        from lightning_fastmoe.ops import native

        found = super().version()
        if torch.cuda.is_available() and (reason := native.unavailable_reason()):
            found += f" WITHOUT KERNELS ({reason})"
        return found

    def build(self, problem: Problem) -> Layer:
        from lightning_fastmoe import ops

        leaves = given_leaves(problem)
        config = problem.config

        def forward() -> Tensor:
            x, weights, up, down = (leaves[n] for n in ("x", "weights", "up", "down"))
            order = ops.order_by_expert(problem.expert_ids, config.num_experts)
            return ops.expert_layer(x, weights, order, up, down, config.activation)

        return Layer(forward, leaves)


class OursGroupedMM(Ours):
    """This package's layer with PyTorch's grouped products, on a GPU that has our own."""

    name = "ours-grouped-mm"
    title = "lightning_fastmoe, F.grouped_mm"
    note = "as lightning_fastmoe, but with LIGHTNING_FASTMOE_HOPPER=0"
    own_products = False


class OursModule(Ours):
    """This package's whole module: it does its own routing and adds its losses."""

    name = "ours-module"
    title = "lightning_fastmoe.MoE"
    note = (
        "the whole module: router product in fp32, softmax, top-k, both losses; compare it with"
        " the peers that have such a router, since the others are given their routing"
    )
    with_router = True

    def build(self, problem: Problem) -> Layer:
        from torch import nn

        from lightning_fastmoe.nn import MoE

        config = problem.config
        with torch.device("meta"):
            module = MoE(
                config.d_model,
                config.d_ffn,
                config.num_experts,
                config.top_k,
                activation=config.activation,
                load_balancing=LOAD_BALANCING,
                z_loss=Z_LOSS,
                dispatcher="local",
            )
        module.experts.up_proj = nn.Parameter(problem.up)
        module.experts.down_proj = nn.Parameter(problem.down)
        module.router.weight = nn.Parameter(problem.router)
        x = leaf(problem.x)
        leaves = {
            "x": x,
            "router": module.router.weight,
            "up": module.experts.up_proj,
            "down": module.experts.down_proj,
        }
        return Layer(lambda: module(x), leaves)
