"""Predicts what DeepSpeed's ZeRO will allocate for weights, gradients and optimizer."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_fastmoe.planning.sizes import numel

_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: a partition starts at 4 bytes of bf16


@dataclass(frozen=True)
class Group:
    """Parameters that are partitioned over the same group of ranks.

    Attributes:
        sizes: elements of each parameter on this rank, in the optimizer's order.
        ranks: the size of the (expert) data parallel group.
        experts: whether they belong to experts.
        requires_grad: whether they are trained.
    """

    sizes: Sequence[int]
    ranks: int
    experts: bool = False
    requires_grad: bool = True


@dataclass(frozen=True)
class Bytes:
    """Bytes on one rank; the maximum over ranks, where they differ.

    Attributes:
        weights: the weights for forward and backward. In stage 3, this rank's partitions plus small
            parameters in full; large ones are additionally gathered temporarily.
        gradients: the maximum held between backward and step. Stage 1 holds all of them while
            accumulating; without accumulation it frees some as early as stage 2 does.
        optimizer: the optimizer's states and the fp32 copy of the weights that it updates.
        buffers: communication buckets, whose sizes are settings (``reduce_bucket_size``); stages 1
            and 2 have none unless they offload.
        on_host: names of the fields that are offloaded to host memory.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    on_host: frozenset[str] = frozenset()

    @property
    def device(self) -> int:
        """Total bytes on the device."""
        names = ("weights", "gradients", "optimizer", "buffers")
        return sum(getattr(self, name) for name in names if name not in self.on_host)

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.buffers + other.buffers,
            self.on_host | other.on_host,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """One rank's memory, without activations.

    Attributes:
        dense: everything but sharded experts.
        experts: experts that are sharded over ranks.
        buffers: communication buffers.
        state_bytes: bytes of optimizer state per parameter; None if unknown.
    """

    dense: Bytes
    experts: Bytes
    buffers: Bytes
    state_bytes: float | None

    @property
    def total(self) -> Bytes:
        """The sum of all parts."""
        return self.dense + self.experts + self.buffers


def plan(
    groups: Iterable[Group],
    *,
    stage: int,
    itemsize: int,
    state_bytes: float | None,
    config: Mapping[str, Any],
) -> MemoryPlan:
    """Computes the bytes per rank.

    Args:
        groups: all parameters.
        stage: the ZeRO stage, 1 to 3.
        itemsize: bytes of a weight and of a gradient.
        state_bytes: optimizer state per parameter, see :func:`optimizer_state_bytes`.
        config: DeepSpeed's ``zero_optimization``.
    """
    dense = experts = Bytes()
    master = 4 + (state_bytes or 0.0)
    groups = list(groups)
    for group in groups:
        part = (
            _partitioned(group, itemsize, master, config)
            if stage == 3
            else _whole(group, itemsize, master, stage)
        )
        if group.experts:
            experts += part
        else:
            dense += part
    host = frozenset(
        name
        for name, option in (("optimizer", "offload_optimizer"), ("weights", "offload_param"))
        if (config.get(option) or {}).get("device", "none") != "none"
    )
    bucket = int(config.get("reduce_bucket_size", 500_000_000))
    doubled = 2 if stage < 3 and config.get("overlap_comm") else 1
    if stage < 3 and not host:
        bucket = 0  # gradients are reduced where they are
    buffers = Bytes(buffers=bucket * itemsize * doubled)
    if "optimizer" in host and stage < 3:
        host |= {"gradients"}  # kept with the optimizer that reads them
    dense, experts = (replace(x, on_host=host) for x in (dense, experts))
    return MemoryPlan(dense, experts, buffers, state_bytes)


def _whole(group: Group, itemsize: int, master: float, stage: int) -> Bytes:
    """Stages 1 and 2: parameters are concatenated and split into equal parts for the ranks."""
    count = sum(group.sizes)
    if not group.requires_grad:
        return Bytes(weights=count * itemsize)
    unit = _ALIGNMENT * group.ranks
    padded = math.ceil(count / unit) * unit
    part = padded // group.ranks
    held = count
    if stage == 2:
        # A rank keeps the full gradients of all parameters that overlap its part.
        ends = [sum(group.sizes[: i + 1]) for i in range(len(group.sizes))]
        held = max(
            sum(
                size
                for size, end in zip(group.sizes, ends, strict=True)
                if end > rank * part and end - size < (rank + 1) * part
            )
            for rank in range(group.ranks)
        )
    return Bytes(
        weights=padded * itemsize, gradients=held * itemsize, optimizer=round(part * master)
    )


def _partitioned(group: Group, itemsize: int, master: float, config: Mapping[str, Any]) -> Bytes:
    """Stage 3: each parameter is partitioned separately."""
    parts = [math.ceil(size / group.ranks) for size in group.sizes]
    part = sum(parts)
    name = "param_persistence_threshold"
    threshold = int(config.get(f"stage3_{name}", config.get(name, 100_000)))
    kept = sum(s for s in group.sizes if s <= threshold) if group.ranks > 1 else 0
    if not group.requires_grad:
        return Bytes(weights=(part + kept) * itemsize)
    return Bytes(
        weights=(part + kept) * itemsize,
        gradients=part * itemsize,
        optimizer=round(part * master),
    )


def optimizer_state_bytes(optimizer: Optimizer) -> float | None:
    """Bytes of state that the optimizer keeps per parameter, in fp32; 8 for Adam.

    Measured by a step of a copy of the optimizer on a vector of zeros, since ZeRO gives it vectors
    too. None if that fails.
    """
    vector = nn.Parameter(torch.zeros(1024))
    vector.grad = torch.zeros_like(vector)
    try:
        twin = copy.copy(optimizer)
        twin.param_groups = [{**optimizer.param_groups[0], "params": [vector]}]
        twin.state = defaultdict(dict)
        twin.step()
        tensors = [x for x in twin.state[vector].values() if isinstance(x, torch.Tensor)]
    except Exception:  # a custom optimizer may need anything
        return None
    return sum(x.numel() * x.element_size() for x in tensors if x.numel() > 1) / vector.numel()


def groups_of(
    module: nn.Module, optimizer: Optimizer, world_size: int, expert_data_parallel_size: int
) -> list[Group]:
    """The optimizer's groups as DeepSpeed will partition them, and groups of frozen parameters.

    Args:
        module: the whole model, experts sharded.
        optimizer: its groups hold experts or other parameters, not both.
        world_size: ranks that share everything but experts.
        expert_data_parallel_size: ranks that share one expert.
    """
    groups = []
    trained: set[int] = set()
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.requires_grad]
        trained |= {id(p) for p in parameters}
        experts = bool(group.get("moe"))
        ranks = expert_data_parallel_size if experts else world_size
        if parameters:
            groups.append(Group([numel(p) for p in parameters], ranks, experts))
    frozen = [p for p in module.parameters() if id(p) not in trained]
    for experts, ranks in ((False, world_size), (True, expert_data_parallel_size)):
        sizes = [numel(p) for p in frozen if getattr(p, "allreduce", True) != experts]
        if sizes:
            groups.append(Group(sizes, ranks, experts, requires_grad=False))
    return groups
