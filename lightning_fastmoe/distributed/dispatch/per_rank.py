"""Rows per (token, rank): what is sent where, and the exchanges with their gradients.

Each exchange is two autograd nodes: one starts it, the other waits for it. In the backward pass
they change roles. What is computed between them runs beside the exchange, in both directions, and
ranks start exchanges in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.dispatch.route import Route
from lightning_fastmoe.ops import kernels


@dataclass(frozen=True)
class RankPlan:
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

    def slots_of_tokens(self, by_row: Tensor) -> Tensor:
        """``by_row (S, K) -> (T, K)``: each slot's value from the rank of its expert, or zero."""
        slots = self.slot_place.shape[1]
        # Negative for dropped slots.
        place = self.slot_place * slots + torch.arange(slots, device=by_row.device)
        return kernels.rows_or_zeros(by_row.reshape(-1), place.reshape(-1)).view(place.shape)


@dataclass(frozen=True)
class RankDraft:
    """A plan whose number of rows the host doesn't know yet.

    Attributes:
        counts: (E + R,) int64, the tokens of each expert and the rows to each rank.
        owner: (T, K) int64, the rank of each slot's expert, R for dropped slots.
        local: (T, K) int64, that expert's number there.
        pairs: the (token, rank) pairs by rank; those that aren't sent come last.
        ranks: R.
    """

    counts: Tensor
    owner: Tensor
    local: Tensor
    pairs: ops.ExpertOrder
    ranks: int

    def plan(self, rows: int) -> RankPlan:
        """The plan, which sends ``rows`` rows."""
        sent = self.pairs.first(self.ranks, rows)
        token = torch.div(sent.order, self.ranks, rounding_mode="floor")
        receiver = (sent.order - token * self.ranks).unsqueeze(1)
        here = self.owner.index_select(0, token) == receiver
        ids = self.local.index_select(0, token).masked_fill(~here, -1).to(torch.int32)
        by_rank = sent.inverse.view(len(self.owner), self.ranks)
        by_rank = torch.nn.functional.pad(by_rank, (0, 1), value=-1)  # where dropped slots look
        return RankPlan(token, sent.inverse, by_rank.gather(1, self.owner), ids, self.ranks)


@dataclass
class _Flight:
    """One exchange there and back, and what is under way.

    Attributes:
        plan: what is sent.
        route: the way of the forward pass.
        started: tensors that are arriving, and functions that wait for them.
    """

    plan: RankPlan
    route: Route
    started: list[tuple[Tensor, Callable[[], None]]] = field(default_factory=list)

    def land(self) -> list[Tensor]:
        """Waits for what is under way, and returns it."""
        started, self.started = self.started, []
        for _, finish in started:
            finish()
        return [tensor for tensor, _ in started]


class _Depart(torch.autograd.Function):
    """Starts to send tokens (T, D) and weights (T, K); the backward ends with their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, flight: _Flight) -> tuple[Tensor, Tensor]:
        ctx.flight, plan, route = flight, flight.plan, flight.route
        # One exchange for the two small ones, as bytes.
        small = (plan.ids, weights.index_select(0, plan.token))
        packed = route.start(torch.cat([part.view(torch.uint8) for part in small], dim=1))
        rows = route.start(x.index_select(0, plan.token))
        flight.started = [packed, rows]
        # The second has the shape and the dtype of the weights that arrive; nobody reads it.
        return rows[0], weights.new_empty(rows[0].shape[0], weights.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_row, d_rows = ctx.flight.land()
        plan = ctx.flight.plan
        return plan.sum_over_ranks(d_rows), plan.slots_of_tokens(by_row), None


class _Arrive(torch.autograd.Function):
    """Waits for rows (S', D), weights (S', K) and ids (S', K); the backward starts the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, flight: _Flight
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.flight = flight
        packed, rows = flight.land()
        ids_bytes = packed.shape[1] - weights.shape[1] * weights.element_size()
        parts = packed.tensor_split([ids_bytes], dim=1)
        # Clones, because the second part of a single row is contiguous but not aligned.
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        ids = copies[0].view(flight.plan.ids.dtype)
        ctx.mark_non_differentiable(ids)
        return rows, copies[1].view(weights.dtype), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_weights, _ = grads
        back = ctx.flight.route.back()
        ctx.flight.started = [back.start(d_weights), back.start(d_rows)]
        return d_rows, d_weights, None  # only their shapes count: _Depart reads what arrives


class _DepartSums(torch.autograd.Function):
    """Starts to send the sums (S', D) back; the backward ends with their gradient."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.started = [flight.route.start(sums)]
        return flight.started[0][0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        (d_sums,) = ctx.flight.land()
        return d_sums, None


class _ArriveSums(torch.autograd.Function):
    """Waits for the sums (S, D), and sums each token's (T, D); the backward starts a way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        (rows,) = flight.land()
        return flight.plan.sum_over_ranks(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = grads[0].index_select(0, ctx.flight.plan.token)
        ctx.flight.started = [ctx.flight.route.back().start(rows)]
        return rows, None  # only its shape counts


def send_tokens(
    x: Tensor, weights: Tensor, plan: RankPlan, route: Route
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Starts to send each token once per rank, with the experts and weights of its slots.

    Args:
        x: (T, D).
        weights: (T, K).
        plan: what is sent where.
        route: S rows there, S' rows arrive.

    Returns:
        A function that waits for ``rows (S', D)``, ``weights (S', K)`` and ``ids (S', K)``, the
        experts as in :attr:`RankPlan.ids`.
    """
    flight = _Flight(plan, route)
    started = _Depart.apply(x, weights, flight)
    return lambda: _Arrive.apply(*started, flight)


def return_sums(sums: Tensor, plan: RankPlan, route: Route) -> Callable[[], Tensor]:
    """Starts to send the rows' results ``sums (S', D)`` back.

    Args:
        sums: a row for each that arrived.
        plan: of :func:`send_tokens`.
        route: the way back, S' rows there.

    Returns:
        A function that waits for each token's sum over ranks, (T, D).
    """
    flight = _Flight(plan, route)
    started = _DepartSums.apply(sums, flight)
    return lambda: _ArriveSums.apply(started, flight)
