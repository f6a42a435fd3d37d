"""Lets all ranks start with the same options, from the same weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fastmoe.distributed.data_parallel.contents import Contents, Item, check_contents
from lightning_fastmoe.distributed.expert_checks import (
    check_batch_norms,
    check_not_tied,
    divided_experts,
)
from lightning_fastmoe.distributed.mesh import (
    ExpertMesh,
    check_expert_parallel_size,
    expert_parallel_sizes,
)
from lightning_fastmoe.distributed.nodes import check_ranks_per_node
from lightning_fastmoe.errors import ConfigError, FastMoEError, TopologyError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.expert_layers import KINDS, ExpertLayer


def choose_options(
    model: nn.Module,
    layers: Mapping[str, ExpertLayer],
    size: int | Literal["auto"],
    ranks_per_node: int | None,
    world: int,
) -> dict[str, int]:
    """The expert parallel size and the ranks per node; not collective.

    Args:
        model: the model.
        layers: name -> MoE layer, of all its MoE layers.
        size: the expert parallel size, or "auto".
        ranks_per_node: ranks per node; None is torchrun's.
        world: number of ranks.

    Raises:
        TopologyError: if they don't fit the ranks or the layers.
        ConfigError: if the model has experts that can't be sharded, or can't be trained.
    """
    divided = divided_experts(layers.items())
    if ranks_per_node is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        ranks_per_node = local if 0 < local < world and world % local == 0 else world
    check_ranks_per_node(ranks_per_node, world)
    if size == "auto":
        held = {n.num_experts // n.num_local_experts for n in layers.values()} - {1}
        fitting = expert_parallel_sizes(world, ranks_per_node, divided)
        size = held.pop() if len(held) == 1 else fitting[-1]
    check_expert_parallel_size(size, world, divided)
    sharded = {name: layers[name] for name in divided} if size > 1 else {}
    if sharded:
        for kind in KINDS:
            kind.check(model)
        check_not_tied(layers)
    # Before experts are dropped: what is wrong with one is wrong on every rank.
    check_batch_norms(sharded)
    check_contents(model, sharded)
    return {"expert_parallel_size": size, "ranks_per_node": ranks_per_node}


def agree_to_start(
    problem: FastMoEError | None,
    options: Mapping[str, int],
    layers: Mapping[str, ExpertLayer],
) -> None:
    """Raises on all ranks what one of them can't start with; collective.

    Groups are made after this, and ranks that differ would wait for each other there.

    Args:
        problem: what this rank has found.
        options: name -> value, of options that must be the same on all ranks.
        layers: name -> MoE layer, of all its MoE layers.

    Raises:
        FastMoEError: the first rank's problem.
        TopologyError: if the ranks' layers or options differ.
    """
    own = [
        f"{name} with {layer.num_experts} experts, dispatcher={layer.dispatcher_name!r}"
        f"{', exact=True' if layer.exact else ''}"
        for name, layer in layers.items()
    ]
    everyone = _gather((problem, dict(options), own))
    for rank, (found, _, lines) in enumerate(everyone):
        if found is not None:
            raise type(found)(f"{found} (rank {rank})")
        if lines != everyone[0][2]:
            raise _different(rank, 0, lines, everyone[0][2])
    for rank, (_, values, _) in enumerate(everyone):
        for name, first in everyone[0][1].items():
            if values[name] != first:
                raise TopologyError(
                    f"{name} is {first} on rank 0 and {values[name]} on rank {rank}: pass the same"
                    f" {name}= on every rank."
                )


def check_same_tensors(items: Sequence[Item], mesh: ExpertMesh) -> None:
    """Checks that the ranks have the same tensors in the same order; collective.

    Without it, ranks would exchange those of different parameters, or wait forever.

    Args:
        items: this rank's; experts are compared with those of its replicas.
        mesh: the groups.

    Raises:
        TopologyError: on all ranks, naming the first difference.
    """
    dense = [_describe(item) for item in items if not item.is_expert]
    experts = [_describe(item) for item in items if item.is_expert]
    everyone = _gather((_digest(dense), _digest(experts)))
    for rank, (their_dense, their_experts) in enumerate(everyone):
        if their_dense != everyone[0][0]:
            lists = _gather(dense)
            raise _different(rank, 0, lists[rank], lists[0])
        replica = rank % mesh.ep_size  # the first rank with the same experts
        if their_experts != everyone[replica][1]:
            lists = _gather(experts)
            raise _different(rank, replica, lists[rank], lists[replica])


def check_same_model(
    contents: Contents, layers: Mapping[str, ExpertLayer], mesh: ExpertMesh
) -> list[int]:
    """Checks that the ranks have built the same model; collective.

    Returns:
        Number of experts' parameters on each rank of this rank's expert parallel group.

    Raises:
        TopologyError: on all ranks, naming the first difference.
        ConfigError: on all ranks, if layers with random routing have different seeds.
    """
    check_same_tensors([*contents.parameters, *contents.buffers], mesh)
    seeds = [
        f"{name} {layer._seed}"
        for name, layer in layers.items()
        if isinstance(layer, MoE) and layer.router_traits.random
    ]
    count = sum(item.is_expert for item in contents.parameters)
    everyone = _gather((_digest(seeds), count))
    for rank, (their_seeds, _) in enumerate(everyone):
        if their_seeds != everyone[0][0]:
            raise ConfigError(
                f"Rank {rank} built its MoE layers from another seed than rank 0, but some of them"
                " route at random, and must draw the same numbers on every rank. Call"
                " torch.manual_seed() with the same number on all ranks before building the model."
            )
    first = dist.get_rank() - mesh.ep_rank
    return [n for _, n in everyone[first : first + mesh.ep_size]]


@torch.no_grad()
def broadcast_start(contents: Contents, mesh: ExpertMesh) -> None:
    """Copies dense weights and buffers from rank 0, and experts' from their first replica."""
    first_replica = int(mesh.device_mesh.mesh[0, mesh.ep_rank])
    for item in (*contents.parameters, *contents.buffers):
        if not item.is_expert:
            broadcast_tensor(item.tensor, 0)
        elif mesh.edp_size > 1:
            broadcast_tensor(item.tensor, first_replica, mesh.edp_group)


@torch.no_grad()
def broadcast_tensor(tensor: Tensor, source: int, group: dist.ProcessGroup | None = None) -> None:
    """Copies a tensor from a rank to the others, whatever its dtype and strides; collective.

    Args:
        tensor: of the same shape and dtype on each rank.
        source: the rank in the world.
        group: the ranks; None is all.
    """
    distinct = tensor.detach()
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:  # expanded: one element stands for all
            distinct = distinct.narrow(dim, 0, 1)
    if distinct.numel():
        whole = distinct.contiguous()
        # As bytes, so that any dtype works with any backend.
        dist.broadcast(whole.view(-1).view(torch.uint8), source, group)
        if whole.data_ptr() != distinct.data_ptr():
            distinct.copy_(whole)


def check_device(tensors: list[tuple[str, Tensor]]) -> torch.device:
    """The device of a model's tensors, on which the process group must work.

    Raises:
        ConfigError: if they are on several devices, on the meta device, or on another GPU than the
            process's current one.
    """
    if not tensors:
        raise ConfigError("The model has no parameters: there is nothing to train.")
    first, tensor = tensors[0]
    for name, other in tensors:
        if other.is_meta:
            raise ConfigError(
                f"{name} is on the meta device. Create its values first: model.to_empty(...) and"
                " its initialisation, or load weights."
            )
        if other.device != tensor.device:
            raise ConfigError(
                f"{first} is on {tensor.device} and {name} on {other.device}. Move the whole model"
                " to this rank's device before wrapping it."
            )
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ConfigError(
            f"The model is on {device}, but this process's current device is"
            f" cuda:{torch.cuda.current_device()}, which collectives use. Call"
            f" torch.cuda.set_device({device.index}) before init_process_group."
        )
    return device


def _describe(item: Item) -> str:
    kind = f"{item.name} {tuple(item.tensor.shape)} {item.tensor.dtype}"
    is_frozen = isinstance(item.tensor, nn.Parameter) and not item.tensor.requires_grad
    return f"{kind} frozen" if is_frozen else kind


def _digest(lines: list[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _gather(own: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _different(rank: int, other: int, own: list[str], theirs: list[str]) -> TopologyError:
    size = max(len(own), len(theirs))
    pairs = zip(*([*one, *["nothing"] * (size - len(one))] for one in (own, theirs)), strict=True)
    here, there = next((a, b) for a, b in pairs if a != b)
    return TopologyError(
        f"Rank {rank} has built another model than rank {other}: {here} in place of {there}."
        " Build the same model on every rank."
    )
