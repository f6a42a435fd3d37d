"""The mesh of expert parallel and expert data parallel groups of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_fastmoe.distributed.groups import own_group
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.placement import equal_blocks

EDP_DIM, EP_DIM = "expert_data_parallel", "expert_parallel"


@dataclass(frozen=True)
class ExpertMesh:
    """All ranks as a row-major grid ``(expert_data_parallel, expert_parallel)``.

    Ranks of one expert parallel (EP) group are consecutive, so that tokens are exchanged inside a
    node where possible: with world size 4 and EP 2 the EP groups are {0, 1} and {2, 3}, and the
    expert data parallel (EDP) groups, whose ranks hold the same experts, are {0, 2} and {1, 3}.
    """

    device_mesh: DeviceMesh

    @property
    def ep_group(self) -> dist.ProcessGroup:
        """The ranks that together hold one copy of all experts."""
        return self.device_mesh.get_group(EP_DIM)

    @property
    def edp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same experts as this one."""
        return self.device_mesh.get_group(EDP_DIM)

    @property
    def ep_partition(self) -> list[list[int]]:
        """The ranks of each EP group of the world."""
        return self.device_mesh.mesh.tolist()

    @property
    def ep_size(self) -> int:
        """Number of ranks over which experts are sharded."""
        return self.device_mesh.size(1)

    @property
    def ep_rank(self) -> int:
        """This rank's number in its EP group."""
        return self.device_mesh.get_local_rank(EP_DIM)

    @property
    def edp_size(self) -> int:
        """Number of replicas of each expert."""
        return self.device_mesh.size(0)

    def placement(self, num_experts: int) -> list[range]:
        """The global expert ids on each rank of an EP group, for a layer with ``num_experts``."""
        return equal_blocks(num_experts, self.ep_size)

    def local_experts(self, num_experts: int) -> range:
        """The global ids of this rank's experts, for a layer with ``num_experts``."""
        return self.placement(num_experts)[self.ep_rank]


def make_expert_mesh(
    expert_parallel_size: int, device_type: str, timeout: timedelta | None = None
) -> ExpertMesh:
    """Creates the groups; every rank of the world must call this at the same point.

    Args:
        expert_parallel_size: number of ranks over which experts are sharded.
        device_type: "cpu" or "cuda".
        timeout: the time limit of a collective in these groups; None is torch's default.

    Raises:
        TopologyError: if the size does not divide the world.
    """
    world = dist.get_world_size()
    check_expert_parallel_size(expert_parallel_size, world, {})
    grid = torch.arange(world).view(-1, expert_parallel_size)
    # ``init_device_mesh`` would split the world's group, which not all backends support.
    edp = own_group(EDP_DIM, grid.T.tolist(), timeout)
    ep = own_group(EP_DIM, grid.tolist(), timeout)
    assert edp is not None
    assert ep is not None
    names = (EDP_DIM, EP_DIM)
    return ExpertMesh(
        DeviceMesh.from_group([edp, ep], device_type, mesh=grid, mesh_dim_names=names)
    )


def check_expert_parallel_size(size: int, world: int, num_experts: Mapping[str, int]) -> None:
    """Refuses a size that does not divide the world or some layer's experts.

    Args:
        size: expert_parallel_size.
        world: number of ranks.
        num_experts: layer name -> its ``num_experts``.

    Raises:
        TopologyError: naming the sizes that would work.
    """
    if size < 1 or world % size:
        raise TopologyError(
            f"expert_parallel_size={size} does not divide the world of {world} rank(s). Choose one"
            f" of {_divisors(world)}, or 'auto'."
        )
    for name, experts in num_experts.items():
        if experts % size:
            fitting = _divisors(math.gcd(world, *num_experts.values()))
            raise TopologyError(
                f"expert_parallel_size={size} does not divide num_experts={experts} of layer"
                f" {name!r}: each rank must hold equally many experts. Choose one of {fitting}, or"
                " 'auto'."
            )


def expert_parallel_sizes(
    world: int, ranks_per_node: int, num_experts: Mapping[str, int]
) -> list[int]:
    """The sizes that divide all ``num_experts`` and keep each group inside a node, ascending.

    Args:
        world: number of ranks.
        ranks_per_node: ranks per node.
        num_experts: layer name -> its ``num_experts``.
    """
    if not num_experts:
        return [1]
    # It must divide the node size too, or a group of consecutive ranks could span two nodes.
    return _divisors(math.gcd(world, ranks_per_node, *num_experts.values()))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
