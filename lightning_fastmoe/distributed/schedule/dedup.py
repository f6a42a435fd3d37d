"""A schedule that sends each token once to each rank that holds some of its experts.

:class:`~lightning_fastmoe.distributed.dispatch.AllToAllDispatcher` sends a row per chosen expert.
With K = 8 of 128 experts on 2 ranks, that is four times as much between ranks. The owner computes
with the fused layer, whose gather makes the rows per expert, sums a token's rows, and returns one.
The idea is that of DeepEP's dispatch (https://github.com/deepseek-ai/DeepEP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.dispatch import AllToAllDispatcher, ExpertGroup, Route
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.nn.schedule import SequentialSchedule
from lightning_fastmoe.ops import kernels


@dataclass(frozen=True)
class _Plan:
    """Which tokens are sent to which ranks: S rows, by rank, then by token.

    Attributes:
        token: (S,) int64, the token of each row.
        place: (T*R,) int64, the row of each (token, rank) pair, -1 where nothing is sent.
        slot_place: (T, K) int64, the row that carries each slot's weight; -1 for dropped slots.
        ids: (S, K) int32, which expert of the receiving rank each slot chose; -1 if it chose
            another rank's, or is dropped.
        ranks: R.
    """

    token: Tensor
    place: Tensor
    slot_place: Tensor
    ids: Tensor
    ranks: int

    def sum_over_ranks(self, rows: Tensor) -> Tensor:
        """``rows (S, D) -> (T, D)``: each token's sum, in the order of ranks, in fp32."""
        return kernels.sum_rows(rows, self.place, None, self.ranks)


def _exchange_together(a: Tensor, b: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """Sends ``a (S, M)`` and ``b (S, P)``, of any dtypes, in one exchange of bytes."""
    as_bytes = [a.view(torch.uint8), b.view(torch.uint8)]
    received = route.run(torch.cat(as_bytes, dim=1))
    parts = received.split([part.shape[1] for part in as_bytes], dim=1)
    # Clones, because the second part of a single row is contiguous but not aligned.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return copies[0].view(a.dtype), copies[1].view(b.dtype)


class _Scatter(torch.autograd.Function):
    """Tokens and weights to the owners; gradients back: x (S', D), weights (S', K), ids (S', K)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, plan: _Plan, route: Route
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.route = plan, route
        # One exchange for the two small ones, as bytes.
        ids, by_slot = _exchange_together(plan.ids, weights.index_select(0, plan.token), route)
        rows = route.run(x.index_select(0, plan.token))
        ctx.mark_non_differentiable(ids)
        return rows, by_slot, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_weights, _ = grads
        plan, back = ctx.plan, ctx.route.back()
        by_row = back.run(d_weights)
        d_x = plan.sum_over_ranks(back.run(d_rows))
        # Each slot's gradient is where its expert is; the other ranks return zeros for it.
        slots = plan.slot_place.shape[1]
        place = plan.slot_place * slots + torch.arange(slots, device=by_row.device)
        place = place.masked_fill(plan.slot_place < 0, -1)
        d_slots = kernels.rows_or_zeros(by_row.reshape(-1), place.reshape(-1))
        return d_x, d_slots.view(place.shape), None, None


class _Gather(torch.autograd.Function):
    """Each token's sums (S', D) from their owners back to its rank, and their sum (T, D)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: _Plan, route: Route) -> Tensor:
        ctx.plan, ctx.route = plan, route
        return plan.sum_over_ranks(route.run(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.route.back().run(grads[0].index_select(0, ctx.plan.token)), None, None


class DedupSchedule(SequentialSchedule):
    """Sends a row per (token, rank) instead of one per (token, expert).

    For token choice and soft routing with stacked experts. Expert choice and experts that are
    modules, which need rows by expert, go by way of all_to_all.

    The owner sums a token's rows with their weights in fp32 and rounds once; the token's rank sums
    over ranks in fp32. In half precision that is one more rounding per (token, rank) than on one
    rank; sums have a fixed order, so each run gives the same bits.

    Args:
        group: the expert parallel group, shared by all layers of a model.
        num_experts: E of the layer.
        placement: global ids of the experts of each rank, ascending, every id once.

    Raises:
        TopologyError: if the placement doesn't give each expert to exactly one rank.
    """

    def __init__(
        self, group: ExpertGroup, num_experts: int, placement: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(AllToAllDispatcher(group, num_experts, placement))
        self.group, self.num_experts = group, num_experts
        self._held = [list(ids) for ids in placement]
        by_rank = torch.tensor(list(chain(*placement)), dtype=torch.int64)
        sizes = torch.tensor([len(ids) for ids in placement])
        owner = torch.repeat_interleave(torch.arange(group.size), sizes)
        local = torch.cat([torch.arange(len(ids)) for ids in placement])
        # (2, E): each expert's rank and its number there; R and -1 for slots that are dropped.
        self._where = torch.empty(2, num_experts + 1, dtype=torch.int64)
        self._where[:, by_rank] = torch.stack([owner, local])
        self._where[:, num_experts] = torch.tensor([group.size, -1])
        # The rows for each rank are counted with the tokens of each expert.
        group.slots = max(group.slots, num_experts + group.size)

    def run_routed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """See :class:`~lightning_fastmoe.nn.schedule.Schedule`.

        Raises:
            ExchangeError: on all ranks of the group, if they disagree.
        """
        if not experts.is_stacked or inputs.spec is not None or routing.token_ids is not None:
            return super().run_routed(inputs, routing, experts, layer)
        x, weights = inputs.tokens, routing.weights
        plan, send, table = self._plan(routing, x, layer)
        experts_of_ranks, rows_of_ranks = table.split([self.num_experts, self.group.size], dim=1)
        receive = rows_of_ranks[:, self.group.rank].tolist()
        mine = self._held[self.group.rank]
        rows = int(experts_of_ranks[:, mine].sum())
        there = self._route(send, receive, layer, "dispatch")
        back = self._route(receive, send, layer, "combine")
        wide = weights.to(kernels.accumulation_dtype(x.dtype))
        received, by_slot, ids = _Scatter.apply(x, wide, plan, there)
        # Slots that chose experts of other ranks come last, and get no row.
        chosen = torch.where(ids < 0, len(mine), ids).to(torch.int64)
        order = ops.order_by_expert(chosen, len(mine) + 1).first(len(mine), rows)
        sums = experts(received, order.tokens_per_expert, by_slot, order)
        return _Gather.apply(sums, plan, back), routing

    def _plan(self, routing: Routing, x: Tensor, layer: str) -> tuple[_Plan, list[int], Tensor]:
        """The plan, the rows to each rank, and the counts of all ranks: (R, E + R)."""
        ranks, chosen = self.group.size, routing.expert_ids
        if routing.dispatched is not None:
            chosen = chosen.masked_fill(~routing.dispatched, self.num_experts)
        self._where = self._where.to(x.device)
        owner, local = self._where[0][chosen], self._where[1][chosen]  # (T, K)
        every = torch.arange(ranks, device=x.device)
        needs = torch.zeros(len(chosen), ranks + 1, dtype=torch.bool, device=x.device)
        needs = needs.scatter_(1, owner, True)[:, :ranks]
        pairs = ops.order_by_expert(torch.where(needs, every, ranks), ranks + 1)
        counts = ops.order_by_expert(chosen, self.num_experts + 1).tokens_per_expert
        both = torch.cat([counts[:-1], pairs.tokens_per_expert[:-1]])
        table = self.group.exchange_counts(both, x.shape[1], layer)
        send = table[self.group.rank, self.num_experts :].tolist()
        sent = pairs.first(ranks, sum(send))
        token = torch.div(sent.order, ranks, rounding_mode="floor")
        receiver = (sent.order - token * ranks).unsqueeze(1)
        here = owner.index_select(0, token) == receiver
        ids = local.index_select(0, token).masked_fill(~here, -1).to(torch.int32)
        by_rank = sent.inverse.view(len(chosen), ranks)
        by_rank = torch.cat([by_rank, by_rank.new_full((len(chosen), 1), -1)], dim=1)
        plan = _Plan(token, sent.inverse, by_rank.gather(1, owner), ids, ranks)
        return plan, send, table

    def _route(self, send: list[int], receive: list[int], layer: str, phase: str) -> Route:
        return Route(dist.all_to_all_single, self.group, send, receive, layer, phase)
