"""Tells DeepSpeed which parameters are experts, by tags and process groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

from lightning_fastmoe.distributed import ExpertMesh
from lightning_fastmoe.errors import ParameterGroupError, TopologyError
from lightning_fastmoe.nn.expert_layers import ExpertLayer


def group_name(mesh: ExpertMesh) -> str:
    """DeepSpeed's name for the expert data parallel group; it parses the size from it."""
    return f"ep_size_{mesh.ep_size}"


def tag_experts(layers: Iterable[ExpertLayer], mesh: ExpertMesh) -> None:
    """Marks the parameters of sharded experts for DeepSpeed.

    ``allreduce=False`` and ``group_name`` are for ZeRO 1 and 2, the ``ds_zero_*`` tags for ZeRO 3,
    which then partitions the parameter over the expert data parallel group and averages its
    gradient over all ranks.
    """
    for layer in layers:
        if layer.is_sharded:
            for parameter in layer.experts.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = group_name(mesh)  # type: ignore[attr-defined]
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = group_name(mesh)  # type: ignore[attr-defined]


def is_tagged(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed will treat the parameter as an expert."""
    return not getattr(parameter, "allreduce", True)


def check_tags(module: nn.Module, layers: Iterable[ExpertLayer]) -> None:
    """Checks that every parameter tagged as an expert belongs to one of our sharded layers.

    Raises:
        ParameterGroupError: naming the parameter.
    """
    ours = {id(p) for layer in layers if layer.is_sharded for p in layer.experts.parameters()}
    for name, parameter in module.named_parameters():
        if is_tagged(parameter) and id(parameter) not in ours:
            raise ParameterGroupError(
                f"Parameter {name!r} has allreduce=False, so its gradient would not be averaged"
                " over all ranks, but it does not belong to any MoE layer of this package."
                " DeepSpeed's own MoE can't be mixed in; for other parameters remove the attribute."
            )


def register_groups(mesh: ExpertMesh) -> None:
    """Registers the mesh's groups with DeepSpeed, so that it doesn't create its own."""
    from deepspeed.utils import groups

    name = group_name(mesh)
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep_group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp_group
    ranks = mesh.device_mesh.mesh
    row, column = divmod(int(mesh.device_mesh.get_rank()), mesh.ep_size)
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = ranks[row].tolist()
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = ranks[:, column].tolist()


def forget_destroyed_groups() -> None:
    """Makes DeepSpeed forget its process groups if torch has destroyed them.

    DeepSpeed keeps them beyond a run, and learns of their end only if its own function destroys
    them. Call this before a run makes groups.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    kept = groups._WORLD_GROUP
    if kept is not None and not _is_alive(kept):
        groups._release_process_group_references()
        comm.cdb = None


def check_partitions(module: nn.Module) -> None:
    """Checks that the groups still exist over which an earlier run has partitioned parameters.

    Raises:
        TopologyError: naming a parameter whose group has been destroyed.
    """
    for name, parameter in module.named_parameters():
        group = getattr(parameter, "ds_process_group", None)
        if group is not None and not _is_alive(group):
            raise TopologyError(
                f"ZeRO 3 has partitioned parameter {name!r} over a process group that has been"
                " destroyed since. Build the model anew, and load a checkpoint."
            )


def _is_alive(group: dist.ProcessGroup) -> bool:
    return dist.is_initialized() and group in dist.distributed_c10d._world.pg_map
