"""What the ranks run in test_exchange.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from distributed.devices import join
from torch import Tensor

from lightning_fastmoe.distributed.schedule import schedule_across_ranks
from lightning_fastmoe.distributed.symmetric import SymmetricExchange
from lightning_fastmoe.distributed.symmetric.layer import Expectation
from lightning_fastmoe.nn import LocalSchedule, Routing, StackedExperts
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.ops.kernels import accumulation_dtype
from lightning_fastmoe.planning.exchange import LayerShape

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
SHARED = ("_exchange", "_where", "_chosen")
"""What a passage has of the group, of the layer, and of the router, which keeps it in any case."""


def balanced(layer: LayerShape, ranks: int) -> Tensor:
    """(T, K) int64: choices that send the same to each rank, T a multiple of R.

    The choices of a few tokens, and those of the experts at the same places of each other rank.
    """
    assert layer.tokens % ranks == 0
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(layer.tokens // ranks, layer.num_experts, generator=generator)
    some = scores.topk(layer.top_k, dim=1).indices
    shift = layer.num_experts // ranks
    return torch.cat([(some + rank * shift) % layer.num_experts for rank in range(ranks)])


class Layer:
    """This rank's part of a layer."""

    def __init__(self, shape: LayerShape, group: Any) -> None:
        self.shape, self.ranks = shape, group.size
        self.dtype = DTYPES[shape.itemsize]
        activation = "swiglu" if shape.up_rows > shape.d_ffn else "gelu"
        sizes = (shape.d_model, shape.d_ffn, shape.num_experts)
        options = {"activation": activation, "bias": shape.has_biases}
        self.experts = StackedExperts(*sizes, layer_seed=1, **options).to(self.dtype)
        if shape.dispatcher == "local":
            self.schedule: Any = LocalSchedule(shape.num_experts)
            return
        placement = equal_blocks(shape.num_experts, group.size)
        self.experts.keep(placement[group.rank])
        how = group, shape.num_experts, placement, shape.exact
        self.schedule = schedule_across_ranks(shape.dispatcher, *how)

    def run(self) -> tuple[Tensor, Tensor]:
        """Tokens and the output."""
        ids = balanced(self.shape, self.ranks)
        x = torch.randn(self.shape.tokens, self.shape.d_model).to(self.dtype).requires_grad_()
        logits = torch.zeros(self.shape.tokens, self.shape.num_experts)
        weights = torch.rand(ids.shape).to(accumulation_dtype(self.dtype)).requires_grad_()
        inputs = TokenInputs([x], None, (self.shape.tokens,))
        routing = Routing(logits, logits, weights, ids)
        return x, self.schedule.run(inputs, routing, self.experts, None, "a layer")[0]


def buffers(shapes: list[LayerShape]) -> tuple[int, int]:
    """Bytes of a block, and of all memory that others write to, after a pass of each layer."""
    _, group = join("cpu")
    layers = [Layer(shape, group) for shape in shapes]
    for layer in layers:
        layer.run()
    exchange = SymmetricExchange.of(group)
    assert exchange.rows is not None
    return exchange.capacity, exchange.rows.own.nbytes + exchange.control.own.nbytes


def kept(shape: LayerShape, ahead: bool) -> int:
    """Bytes that autograd saves, or nodes of its graph hold, apart from parameters and tokens."""
    _, group = join("cpu")
    layer = Layer(shape, group)
    if ahead:
        schedule = layer.schedule.way if shape.exact else layer.schedule
        schedule.expectation = Expectation()
        layer.run()  # which tells what to expect
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, out = layer.run()
    held = [*saved, *_held_by(out.grad_fn, set())]
    skipped = {t.untyped_storage().data_ptr() for t in [x, *layer.experts.parameters()]}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(n for at, n in storages.items() if at not in skipped)


def _held_by(node: Any, seen: set[int]) -> Iterator[Tensor]:
    """The plans of what was sent, and the orders of what came."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    for name in ("flight", "passage", "exchange", "pairs"):
        owner = getattr(node, name, None)
        if owner is not None:
            own = [value for key, value in vars(owner).items() if key not in SHARED]
            yield from _tensors_in(own)
    for other, _ in node.next_functions:
        yield from _held_by(other, seen)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Those of a list, tuple or dataclass, and of what is in it."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        yield from _tensors_in(list(vars(value).values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors_in(one)
