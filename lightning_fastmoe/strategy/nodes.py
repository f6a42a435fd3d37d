"""Which ranks of a run share a node, as Lightning knows it or the user says."""

from __future__ import annotations

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DeepSpeedStrategy

from lightning_fastmoe.distributed.nodes import check_ranks_per_node


class Nodes:
    """The nodes of a run.

    Args:
        strategy: the strategy, with its ranks and device.
        given: how many consecutive ranks count as a node; None asks Lightning.
    """

    def __init__(self, strategy: DeepSpeedStrategy, given: int | None) -> None:
        self._strategy, self._given = strategy, given

    @property
    def ranks_per_node(self) -> int:
        """How many ranks a node has.

        Raises:
            TopologyError: if the number that was given does not divide the world.
        """
        if self._given is None:
            return self._strategy.num_processes
        check_ranks_per_node(self._given, self._strategy.world_size)
        return self._given

    def of_ranks(self) -> list[int]:
        """The node of each rank, identical on every rank; every rank calls this."""
        strategy, world = self._strategy, self._strategy.world_size
        if self._given is not None or strategy.num_nodes == 1:
            return [rank // self.ranks_per_node for rank in range(world)]
        # Ask, since a launcher may number ranks across nodes in turn, as SLURM's "cyclic" does.
        own = torch.tensor([strategy.node_rank], device=strategy.root_device)
        nodes = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(nodes, own)
        return [int(node) for node in nodes]
