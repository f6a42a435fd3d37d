"""The all-to-all dispatcher: sends tokens to their experts' ranks by ``all_to_all_single``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.dispatch.counts import ExpertGroup
from lightning_fastmoe.distributed.dispatch.route import Route
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.dispatch import RowPlan, order_routing, permute_any, plan_rows
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.nn.router import Routing


class _Exchange(torch.autograd.Function):
    """Sends rows to other ranks; the backward sends gradients back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return route.run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.route.back()
        if torch.is_grad_enabled():  # it will be differentiated, too
            return _Exchange.apply(grads[0], back), None
        return back.run(grads[0]), None


@dataclass(frozen=True)
class AllToAllHandle:
    """What a dispatch keeps for its combine.

    Attributes:
        plan: this rank's pairs by global expert; dropped ones are not sent.
        arrived: order of the received rows, from rank-major to expert-major: with 2 ranks and 2
            local experts, (r0,e0) (r0,e1) (r1,e0) (r1,e1) -> (r0,e0) (r1,e0) (r0,e1) (r1,e1).
        send: rows to each rank.
        receive: rows from each rank.
        layer: the layer's name.
    """

    plan: RowPlan
    arrived: ops.ExpertOrder
    send: list[int]
    receive: list[int]
    layer: str


class AllToAllDispatcher:
    """Sends each row to the rank that owns its expert, and its output back.

    Local rows are ordered by (expert, source rank, token, slot): the order in a single process with
    all tokens, so sums have the same order too.

    Args:
        group: the expert parallel group, shared by all layers of a model.
        num_experts: E of the layer.
        placement: global ids of the experts of each rank, ascending, every id once; None splits
            the experts into R equal blocks.

    Raises:
        TopologyError: if the placement doesn't give each expert to exactly one rank.
    """

    @staticmethod
    def collective(*args: Any, **kwargs: Any) -> Any:
        """Moves rows, by ``all_to_all_single``; a subclass may do it in another way.

        :meth:`ExpertGroup.run` says what the result must be.
        """
        return dist.all_to_all_single(*args, **kwargs)

    def __init__(
        self,
        group: ExpertGroup,
        num_experts: int,
        placement: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.group = group
        self.num_experts = num_experts
        if placement is None:
            placement = equal_blocks(num_experts, group.size)
        if len(placement) != group.size or sorted(chain(*placement)) != list(range(num_experts)):
            raise TopologyError(
                f"The placement {list(map(list, placement))} does not give each of {num_experts}"
                f" experts to exactly one of {group.size} ranks."
            )
        ends = list(accumulate(map(len, placement), initial=0))
        self._ranges = [slice(a, b) for a, b in pairwise(ends)]
        self._column = _columns(placement)
        group.slots = max(group.slots, num_experts)

    def dispatch(
        self, x: Tensor, routing: Routing, layer: str
    ) -> tuple[Tensor, Tensor, AllToAllHandle]:
        """See :class:`~lightning_fastmoe.nn.dispatch.Dispatcher`.

        Raises:
            ExchangeError: on all ranks of the group, if they disagree.
        """
        group = self.group
        if self._column is not None:
            self._column = self._column.to(x.device)
            routing = routing._replace(expert_ids=self._column[routing.expert_ids])
        order = order_routing(routing, self.num_experts)
        counts = order.tokens_per_expert[: self.num_experts]
        table = group.exchange_counts(counts, x.shape[1], layer)
        own = table[group.rank].tolist()
        send = [sum(own[columns]) for columns in self._ranges]
        block = table[:, self._ranges[group.rank]]  # (R, e): what arrives here
        receive = block.sum(dim=1).tolist()
        plan = plan_rows(routing, order, x.shape[0], sum(send))
        arrived = self._expert_major(block, sum(receive), x.device)
        handle = AllToAllHandle(plan, arrived, send, receive, layer)
        return self.send(x, handle), arrived.tokens_per_expert, handle

    def send(self, x: Tensor, handle: AllToAllHandle) -> Tensor:
        """See :class:`~lightning_fastmoe.nn.dispatch.Dispatcher`."""
        rows = handle.plan.gather(x)
        route = self._route(handle.send, handle.receive, handle.layer, "dispatch")
        received: Tensor = _Exchange.apply(rows, route)
        return permute_any(received, handle.arrived)

    def combine(self, y: Tensor, handle: AllToAllHandle) -> Tensor:
        """See :class:`~lightning_fastmoe.nn.dispatch.Dispatcher`."""
        rank_major = ops.permute(y, handle.arrived.inverse, handle.arrived.order)
        route = self._route(handle.receive, handle.send, handle.layer, "combine")
        back: Tensor = _Exchange.apply(rank_major, route)
        return handle.plan.combine(back)

    def _route(self, send: list[int], receive: list[int], layer: str, phase: str) -> Route:
        return Route(self.collective, self.group, send, receive, layer, phase)

    def _expert_major(self, block: Tensor, rows: int, device: torch.device) -> ops.ExpertOrder:
        local = block.shape[1]
        experts = torch.arange(local, device=device).repeat(self.group.size)
        repeats = block.reshape(-1).to(device)
        ids = torch.repeat_interleave(experts, repeats, output_size=rows)
        return ops.order_by_expert(ids, local)


def _columns(placement: Sequence[Sequence[int]]) -> Tensor | None:
    """(E,) each expert's position in rank order; None if that is the order of ids."""
    by_rank = torch.tensor(list(chain(*placement)))
    columns = torch.argsort(by_rank)
    return None if torch.equal(columns, torch.arange(len(columns))) else columns
