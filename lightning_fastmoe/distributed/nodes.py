"""Which ranks of an expert parallel group share a node, and groups within and between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from lightning_fastmoe.distributed.groups import own_group
from lightning_fastmoe.errors import TopologyError


@dataclass(frozen=True)
class NodeGroups:
    """The parts of an expert parallel group of M nodes with L of its ranks each, node by node.

    Attributes:
        inside: the L ranks of this rank's node, in order.
        across: the M ranks with this rank's index on each node, in the order of nodes.
    """

    inside: dist.ProcessGroup
    across: dist.ProcessGroup


def make_node_groups(
    partition: Sequence[Sequence[int]], nodes: Sequence[int], timeout: timedelta | None = None
) -> NodeGroups | None:
    """Creates the groups; every rank of the world must call this at the same point.

    Args:
        partition: the ranks of each expert parallel group.
        nodes: the node of each rank of the world, identical on every rank.
        timeout: the time limit of a collective in these groups; None is torch's default.

    Returns:
        This rank's. None if its expert parallel group has no two levels: if it lies on one node, or
        has a single rank on each, or unequally many, or ranks of a node that don't follow one
        another.
    """
    divided = [levels for ranks in partition if (levels := _levels(ranks, nodes)) is not None]
    inside = own_group("within a node", [part for levels in divided for part in levels], timeout)
    columns = [list(column) for levels in divided for column in zip(*levels, strict=True)]
    across = own_group("between nodes", columns, timeout)
    return None if inside is None or across is None else NodeGroups(inside, across)


def _levels(ranks: Sequence[int], nodes: Sequence[int]) -> list[list[int]] | None:
    """The ranks of each node, if all have equally many, more than one, next to one another."""
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    found = list(by_node.values())
    is_equal = len({len(part) for part in found}) == 1
    in_order = [rank for part in found for rank in part] == list(ranks)
    return found if len(found) > 1 and len(found[0]) > 1 and is_equal and in_order else None


def check_ranks_per_node(ranks_per_node: int, world: int) -> None:
    """Refuses a number of ranks per node that does not divide the world.

    Raises:
        TopologyError: naming both.
    """
    if ranks_per_node < 1 or world % ranks_per_node:
        raise TopologyError(
            f"ranks_per_node={ranks_per_node} does not divide the world of {world} rank(s): every"
            " node must have equally many. Choose a divisor, or leave it out."
        )
