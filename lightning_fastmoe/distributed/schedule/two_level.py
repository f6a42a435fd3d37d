"""Deduplication in two levels: a token crosses the network once per node, then fans out there.

A row goes to the rank of the other node that has the same index within it; that rank sends it on to
those ranks of its node that hold some of its experts, and returns the sum over them. Sizes of both
levels follow from counts that each rank knows of its own tokens, so the host waits once, for an
exchange of the whole group: ranks that disagree all raise before a row is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.dispatch import AllToAllDispatcher, ExpertGroup, Route
from lightning_fastmoe.distributed.dispatch.per_rank import return_sums, send_tokens
from lightning_fastmoe.distributed.schedule.dedup import Draft, draft, owners
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.nn.schedule import SequentialSchedule
from lightning_fastmoe.ops import kernels


@dataclass(frozen=True)
class NodeGroups:
    """The parts of an expert parallel group of M nodes with L of its ranks each, node by node.

    Attributes:
        inside: the ranks of this rank's node, in order.
        across: the ranks with this rank's index on each node, in the order of nodes.
    """

    inside: dist.ProcessGroup
    across: dist.ProcessGroup


class TwoLevelDedupSchedule(SequentialSchedule):
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
        TopologyError: if the placement doesn't give each expert to exactly one rank.
    """

    def __init__(
        self,
        group: ExpertGroup,
        num_experts: int,
        placement: Sequence[Sequence[int]],
        nodes: NodeGroups,
    ) -> None:
        super().__init__(AllToAllDispatcher(group, num_experts, placement))
        self.group, self.num_experts, self.nodes = group, num_experts, nodes
        self._local = local = dist.get_world_size(nodes.inside)
        self._held = [list(ids) for ids in placement]
        of_nodes = [
            list(chain(*self._held[first : first + local])) for first in range(0, group.size, local)
        ]
        self._per_node = [len(ids) for ids in of_nodes]
        own = self._held[group.rank // local * local :][:local]
        starts = torch.tensor([0, *map(len, own)]).cumsum(0).tolist()
        within = [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        self._by_node = owners(of_nodes, num_experts)
        self._by_rank = owners(placement, num_experts)
        self._inside = owners(within, starts[-1])
        # Tokens of each expert, rows to each node, and rows to each rank.
        self._columns = [num_experts, len(of_nodes), group.size]
        group.slots = max(group.slots, sum(self._columns))

    def run_routed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """See :class:`~lightning_fastmoe.nn.schedule.Schedule`.

        Raises:
            ExchangeError: on all ranks of the group, if they disagree.
        """
        if not experts.is_stacked or inputs.spec is not None or routing.token_ids is not None:
            return super().run_routed(inputs, routing, experts, layer)
        x, local, e = inputs.tokens, self._local, len(self._held[self.group.rank])
        node, index = divmod(self.group.rank, local)
        chosen = routing.expert_ids
        if routing.dispatched is not None:
            chosen = chosen.masked_fill(~routing.dispatched, self.num_experts)
        wide = routing.weights.to(kernels.accumulation_dtype(x.dtype))
        outer = self._draft(chosen, self._by_node, len(self._per_node))
        by_rank = self._draft(chosen, self._by_rank, self.group.size).counts[self.num_experts :]
        table = self.group.exchange_counts(torch.cat([outer.counts, by_rank]), x.shape[1], layer)
        of_experts, to_nodes, to_ranks = table.split(self._columns, dim=1)
        # What a rank sends on within its node is what its counterparts have for each rank of it.
        peers = to_nodes[index::local]  # (M, M)
        relayed = to_ranks[:, node * local :][:, :local].view(-1, local, local).sum(dim=0)

        def route(of: dist.ProcessGroup, counts: Tensor, i: int, what: str) -> tuple[Route, Route]:
            send, receive = counts[i].tolist(), counts[:, i].tolist()
            collective = partial(_in_part, of)
            return (
                Route(collective, self.group, send, receive, layer, f"dispatch {what}"),
                Route(collective, self.group, receive, send, layer, f"combine {what}"),
            )

        there, back = route(self.nodes.across, peers, node, "between nodes")
        plan = outer.plan(sum(there.send))
        relay, weights, ids = send_tokens(x, wide, plan, there)()
        mine = torch.where(ids < 0, self._per_node[node], ids).to(torch.int64)
        fan, join = route(self.nodes.inside, relayed, index, "within the node")
        inner = self._draft(mine, self._inside, local).plan(sum(fan.send))
        received, weights, ids = send_tokens(relay, weights, inner, fan)()
        # Slots that chose experts of other ranks come last, and get no row.
        order = ops.order_by_expert(torch.where(ids < 0, e, ids).to(torch.int64), e + 1)
        order = order.first(e, int(of_experts[:, self._held[self.group.rank]].sum()))
        sums = experts(received, order.tokens_per_expert, weights, order)
        sums = return_sums(sums, inner, join)()
        return return_sums(sums, plan, back)(), routing

    def _draft(self, chosen: Tensor, where: Tensor, ranks: int) -> Draft:
        return draft(chosen, where.to(chosen.device), ranks)


def _in_part(part: dist.ProcessGroup, *args: Any, group: Any, **kwargs: Any) -> Any:
    """``all_to_all_single`` in a part of the group whose deadline and record it uses."""
    return dist.all_to_all_single(*args, group=part, **kwargs)
