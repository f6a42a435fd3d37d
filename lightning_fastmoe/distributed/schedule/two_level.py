"""Deduplication in two levels: a token crosses the network once per node, then fans out there.

A row goes to the rank of the other node that has the same index within it; that rank sends it on to
those ranks of its node that hold some of its experts, and returns the sum over them. Sizes of both
levels follow from counts that each rank knows of its own tokens, so the host waits once, for an
exchange of the whole group: ranks that disagree all raise before a row is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.distributed.dispatch import ExpertGroup, Route
from lightning_fastmoe.distributed.dispatch.per_rank import return_sums, send_tokens
from lightning_fastmoe.distributed.nodes import NodeGroups
from lightning_fastmoe.distributed.schedule.dedup import (
    DedupSchedule,
    draft,
    needed,
    owners,
    run_experts,
)
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.experts import Experts


class TwoLevelDedupSchedule(DedupSchedule):
    """Sends a row per (token, node) between nodes, and per (token, rank) within a node.

    Expert choice and experts that are modules go by way of all_to_all, over the whole group.

    A node's rank sums over its node's ranks in fp32 and rounds once, the token's rank over nodes,
    both in rank order: one more rounding per (token, node) in half precision than one level.

    Args:
        group: the expert parallel group; its counts, deadline and record serve both levels.
        num_experts: E of the layer.
        placement: global ids of the experts of each rank, ascending, every id once.
        nodes: the two parts of the group.

    Raises:
        TopologyError: if the placement doesn't give each expert to exactly one rank, or the parts
            are not those of the group.
    """

    def __init__(
        self,
        group: ExpertGroup,
        num_experts: int,
        placement: Sequence[Sequence[int]],
        nodes: NodeGroups,
    ) -> None:
        super().__init__(group, num_experts, placement)
        self.nodes = nodes
        self._inside = inside = dist.get_world_size(nodes.inside)
        _check_parts(group, nodes)
        starts = range(0, group.size, inside)
        of_nodes = [list(chain(*self.held[first : first + inside])) for first in starts]
        self._per_node = [len(ids) for ids in of_nodes]
        first = group.rank // inside * inside
        ends = list(accumulate(map(len, self.held[first : first + inside]), initial=0))
        # Experts by their numbers in the whole model, and by those within this rank's node.
        self._tables = (
            owners(of_nodes, num_experts),
            owners(placement, num_experts),
            owners([range(a, b) for a, b in pairwise(ends)], ends[-1]),
        )
        # Tokens of each expert, rows to each node, and rows to each rank.
        self._columns = [num_experts, len(of_nodes), group.size]
        group.slots = max(group.slots, sum(self._columns))

    def run_per_rank(
        self, x: Tensor, chosen: Tensor, wide: Tensor, experts: Experts, layer: str
    ) -> tuple[Tensor, Tensor]:
        """See :class:`DedupSchedule`."""
        rank, inside = self.group.rank, self._inside
        node, index = divmod(rank, inside)
        by_node, by_rank, within = (table.to(x.device) for table in self._tables)
        self._tables = by_node, by_rank, within
        outer = draft(chosen, by_node, len(self._per_node))
        to_each_rank = needed(by_rank[0][chosen], self.group.size).sum(0)
        counts = torch.cat([outer.counts, to_each_rank])
        table = self.group.exchange_counts(counts, x.shape[1], layer)
        of_experts, to_nodes, to_ranks = table.split(self._columns, dim=1)
        # What a rank sends on within its node is what its counterparts have for each rank of it.
        relayed = to_ranks[:, node * inside : (node + 1) * inside].unflatten(0, (-1, inside)).sum(0)
        there, back = self._routes(True, to_nodes[index::inside], node, layer)
        fan, join = self._routes(False, relayed, index, layer)
        plan = outer.plan(sum(there.send))
        rows, weights, ids = send_tokens(x, wide, plan, there)()
        ids = torch.where(ids < 0, self._per_node[node], ids).long()
        inner = draft(ids, within, inside).plan(sum(fan.send))
        received, weights, ids = send_tokens(rows, weights, inner, fan)()
        held = self.held[rank]
        computed = int(of_experts[:, held].sum())
        keys = torch.where(ids < 0, len(held), ids).long()
        sums = run_experts(experts, received, weights, keys, len(held), computed)
        sums = return_sums(sums, inner, join)()
        return return_sums(sums, plan, back)(), outer.counts[: self.num_experts]

    def _routes(self, between: bool, counts: Tensor, own: int, layer: str) -> tuple[Route, Route]:
        """There and back, between nodes or within this one.

        Args:
            between: which.
            counts: rows from each rank of that part of the group to each.
            own: this rank's number in it.
            layer: the layer's name.
        """
        part = self.nodes.across if between else self.nodes.inside
        what = "between nodes" if between else "within the node"
        send, receive = counts[own].tolist(), counts[:, own].tolist()
        there = Route(partial(_in_part, part), self.group, send, receive, layer, f"dispatch {what}")
        return there, replace(there, send=receive, receive=send, phase=f"combine {what}")


def _in_part(part: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
    """``all_to_all_single`` in a part of the group whose deadline and record it uses."""
    return dist.all_to_all_single(*args, **{**kwargs, "group": part})


def _check_parts(group: ExpertGroup, nodes: NodeGroups) -> None:
    """Refuses parts that would send rows to wrong ranks.

    Raises:
        TopologyError: naming both.
    """
    everyone = dist.get_process_group_ranks(group.group)
    inside, across = map(dist.get_process_group_ranks, (nodes.inside, nodes.across))
    node, index = divmod(group.rank, len(inside))
    wanted = (
        everyone[node * len(inside) : (node + 1) * len(inside)],
        everyone[index :: len(inside)],
    )
    if len(everyone) % len(inside) or (inside, across) != wanted:
        raise TopologyError(
            f"Ranks {inside} as one node and ranks {across} as one of each node do not divide the"
            f" expert parallel group {everyone} of rank {dist.get_rank()} into equal nodes."
            " Make the groups with make_node_groups."
        )
