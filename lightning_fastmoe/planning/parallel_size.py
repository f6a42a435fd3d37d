"""Chooses an expert parallel size by memory: the smallest at which a rank's share fits.

Expert parallelism exchanges tokens in each layer, data parallelism averages gradients once per
step, so a larger size than needed costs time in everything measured so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.planning.exchange import layer_shapes, symmetric_buffers
from lightning_fastmoe.planning.memory import Group, plan
from lightning_fastmoe.planning.sizes import numel

SHARE = 0.6
"""Of a device's memory, for weights, gradients, optimizer and the buffers of the exchange; the rest
is for activations."""
ADAM = 8.0
"""Bytes of state per parameter. The optimizer doesn't exist yet when a model is built."""


@dataclass(frozen=True)
class SizeChoice:
    """An expert parallel size, and why.

    Attributes:
        size: the expert parallel size.
        needed: bytes of each rank for weights, gradients and Adam's state, and for buffers.
        memory: bytes of the smallest device.
        buffers: those of ``needed`` that other ranks send tokens to; 0 if the tokens are unknown.
    """

    size: int
    needed: int
    memory: int
    buffers: int = 0

    @property
    def fits(self) -> bool:
        """Whether the rest of the memory is left to activations."""
        return self.needed <= SHARE * self.memory

    def __str__(self) -> str:
        reason = (
            "the smallest that fits"
            if self.fits
            else "the largest that divides the experts and stays in a node, but activations may not"
            " fit"
        )
        parts = "weights, gradients and Adam's state"
        if self.buffers:
            parts = (
                "weights, gradients, Adam's state and buffers for the exchange of tokens"
                f" ({self.buffers / 2**30:.1f} GiB)"
            )
        return (
            f"expert_parallel_size='auto' is {self.size}, {reason}: {parts} take"
            f" {self.needed / 2**30:.1f} of {self.memory / 2**30:.1f} GiB per rank"
            f" (limit {SHARE:.0%})."
        )


def smallest_that_fits(
    sizes: Sequence[int], needed: Sequence[int], buffers: Sequence[int], memory: int
) -> SizeChoice:
    """The smallest size at which :data:`SHARE` of the memory is enough, or else the largest.

    Args:
        sizes: possible sizes, ascending.
        needed: the bytes of each rank at each of them, see :func:`bytes_at`.
        buffers: bytes that the exchange of tokens takes besides, see :func:`buffers_at`.
        memory: bytes of the smallest device.
    """
    choices = [
        SizeChoice(size, held + more, memory, more)
        for size, held, more in zip(sizes, needed, buffers, strict=True)
    ]
    return next((choice for choice in choices if choice.fits), choices[-1])


def bytes_at(
    module: nn.Module,
    layers: Sequence[ExpertLayer],
    sizes: Sequence[int],
    *,
    world: int,
    stage: int,
    itemsize: int,
    config: Mapping[str, Any],
) -> list[int]:
    """Bytes of a rank for weights, gradients and Adam's state, at each size.

    Args:
        module: the whole model, whatever part of its experts is on this rank.
        layers: its layers whose experts are divided over ranks.
        sizes: expert parallel sizes.
        world: number of ranks.
        stage: the ZeRO stage, 1 to 3.
        itemsize: bytes of a weight.
        config: DeepSpeed's ``zero_optimization``.
    """
    options: dict[str, Any] = {"itemsize": itemsize, "state_bytes": ADAM, "config": config}
    all_groups = [groups_at(module, layers, size, world) for size in sizes]
    return [plan(groups, stage=stage, **options).total.device for groups in all_groups]


def buffers_at(
    layers: Sequence[ExpertLayer],
    sizes: Sequence[int],
    *,
    tokens: int | None,
    itemsize: int,
    exact: bool = False,
) -> list[int]:
    """Bytes of a rank that others send tokens to, at each size.

    What layers keep of these tokens counts among the activations, as the tokens themselves.

    Args:
        layers: as for :func:`bytes_at`.
        sizes: expert parallel sizes.
        tokens: of a rank's micro-batch; None if they are unknown, which gives zeros.
        itemsize: bytes of an element of a token.
        exact: whether all layers must have the bits of one process, not only those that say so.
    """
    shapes = [] if tokens is None else layer_shapes(layers, tokens, itemsize, exact=exact)
    return [symmetric_buffers(shapes, size) for size in sizes]


def groups_at(
    module: nn.Module, layers: Sequence[ExpertLayer], size: int, world: int
) -> list[Group]:
    """All parameters as ZeRO would partition them at an expert parallel size."""
    experts: dict[bool, list[int]] = {True: [], False: []}
    dense: dict[bool, list[int]] = {True: [], False: []}
    routed = set()
    for layer in layers:
        whole = layer.num_experts / layer.num_local_experts
        for parameter in layer.experts.parameters():
            routed.add(id(parameter))
            experts[parameter.requires_grad].append(round(numel(parameter) * whole / size))
    for parameter in module.parameters():
        if id(parameter) not in routed:
            dense[parameter.requires_grad].append(numel(parameter))
    return [
        Group(counts, ranks, are_experts, requires_grad=trained)
        for found, ranks, are_experts in ((dense, world, False), (experts, world // size, True))
        for trained, counts in found.items()
        if counts
    ]
