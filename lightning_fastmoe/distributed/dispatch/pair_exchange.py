"""A row per (token, rank) to the experts, and a row per (token, slot) pair back.

The rank of the experts leaves the weighted sum over slots to the token's rank, which makes it as a
layer does that has all experts, in the same order, rounding once. In the backward pass it is the
gradients of the tokens that come back by pair.

Both sides know the order of pairs without exchanging it. A rank sends its tokens in their order, so
the n-th slot, by token and then by slot, that chose an expert of some rank is the n-th of those
that the rank finds in the rows of this one.

T tokens, K slots, R ranks; S' rows arrive, of which N (row, slot) pairs choose an expert here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe import ops
from lightning_fastmoe.distributed.dispatch.counts import ExpertGroup
from lightning_fastmoe.distributed.dispatch.per_rank import RankDraft, send_tokens
from lightning_fastmoe.distributed.dispatch.route import Route
from lightning_fastmoe.ops import kernels

COMBINE, DISPATCH_BACKWARD = "combine", "dispatch (backward)"


class SentTokens(NamedTuple):
    """What arrived here.

    Attributes:
        rows: (S', D), by rank.
        weights: (S', K).
        keys: (S', K) int64, the local expert that each slot chose, e if another rank's.
        pairs: N.
    """

    rows: Tensor
    weights: Tensor
    keys: Tensor
    pairs: int


@dataclass(frozen=True)
class ArrivedPairs:
    """The pairs here, by expert.

    Attributes:
        order: of the S'*K (row, slot) pairs; those without an expert here have no row.
        row: (N,) int64, the arrived row of each.
        sent: (N,) int64, the places of the pairs in the order in which they are sent back: by
            arrived row, then by slot.
    """

    order: ops.ExpertOrder
    row: Tensor
    sent: Tensor

    @classmethod
    def of(cls, keys: Tensor, num_local: int, pairs: int) -> ArrivedPairs:
        """From ``keys (S', K)``; nothing is read from the device."""
        order = ops.order_of_held(keys, num_local, pairs)
        row = torch.div(order.order, keys.shape[1], rounding_mode="floor")
        is_elsewhere = (order.inverse < 0).long()
        by_row = ops.order_of_held(is_elsewhere, 1, pairs).order
        return cls(order, row, order.inverse.index_select(0, by_row))


class PairExchange(Protocol):
    """One pass of tokens through a layer.

    Attributes:
        num_local: e, the experts of this rank.
    """

    num_local: int

    @property
    def of_experts(self) -> Tensor:
        """(E,) int64, this rank's tokens of each expert; once they have been sent."""
        ...

    def send_tokens(self, x: Tensor, weights: Tensor) -> SentTokens:
        """Sends ``x (T, D)`` and ``weights (T, K)``, and waits for what comes here."""
        ...

    def places(self) -> Tensor:
        """(T*K,) int64: which of the returned rows is a slot's; -1 for dropped slots."""
        ...

    def return_rows(self, parts: Sequence[Tensor], pairs: ArrivedPairs, phase: str) -> list[Tensor]:
        """Sends a row of each part back for each pair, and waits for those of this rank's tokens.

        Args:
            parts: each (N, width), by expert.
            pairs: what arrived.
            phase: what is exchanged.

        Returns:
            A tensor like each part, with a row for each slot that isn't dropped.
        """
        ...

    def send_gradient(self, grad: Tensor) -> Tensor:
        """``(T, D) -> (S', D)``: the gradient of each token's sum, for the rows that arrived."""
        ...


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, exchange: PairExchange, found: list[ArrivedPairs]
    ) -> tuple[Tensor, Tensor]:
        came = exchange.send_tokens(x, weights)
        pairs = ArrivedPairs.of(came.keys, exchange.num_local, came.pairs)
        found.append(pairs)
        ctx.exchange, ctx.pairs, ctx.slots = exchange, pairs, weights.shape[1]
        by_pair = came.weights.reshape(-1).index_select(0, pairs.order.order)
        return came.rows.index_select(0, pairs.row), by_pair.unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange, slots = ctx.exchange, ctx.slots
        rows, by_pair = exchange.return_rows(grads, ctx.pairs, DISPATCH_BACKWARD)
        places = exchange.places()
        d_weights = kernels.rows_or_zeros(by_pair, places).view(-1, slots)
        return kernels.sum_rows(rows, places, None, slots), d_weights, None, None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weights: Tensor,
        exchange: PairExchange,
        pairs: ArrivedPairs,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.exchange, ctx.pairs, ctx.dtype = exchange, pairs, y.dtype
        (rows,) = exchange.return_rows([y], pairs, COMBINE)
        return kernels.sum_rows(rows, exchange.places(), weights, weights.shape[1]).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows = ctx.exchange.send_gradient(grads[0].contiguous())
        return d_rows.index_select(0, ctx.pairs.row).to(ctx.dtype), *(None,) * 4


def send_pairs(
    x: Tensor, weights: Tensor, exchange: PairExchange
) -> tuple[Tensor, Tensor, ArrivedPairs]:
    """Sends tokens, and makes a row for each pair that chose an expert here.

    Args:
        x: (T, D).
        weights: (T, K), in the accumulation dtype.
        exchange: of this pass.

    Returns:
        ``rows (N, D)`` and ``weights (N, 1)`` by expert, and the pairs.
    """
    found: list[ArrivedPairs] = []
    rows, by_pair = _Pairs.apply(x, weights, exchange, found)
    return rows, by_pair, found[0]


def sum_pairs(
    y: Tensor,
    weights: Tensor,
    exchange: PairExchange,
    pairs: ArrivedPairs,
    dtype: torch.dtype,
) -> Tensor:
    """Sends what experts made of the pairs back, to be summed with weights where they came from.

    The gradient of a row is that of the sum, without its weight: that of
    :class:`~lightning_fastmoe.ops.PairRows`. The weights get theirs there, too.

    Args:
        y: (N, D), by expert.
        weights: (T, K), as for :func:`send_pairs`.
        exchange: of this pass.
        pairs: of :func:`send_pairs`.
        dtype: of the tokens.

    Returns:
        (T, D) in that dtype, each sum in slot order and rounded once.
    """
    return _Sums.apply(y, weights.detach(), exchange, pairs, dtype)  # type: ignore[no-any-return]


def places_of(owner: Tensor, ranks: int) -> Tensor:
    """:meth:`PairExchange.places`, of rows by rank, from ``owner (T, K)``, R for dropped slots."""
    return ops.order_of_held(owner.long(), ranks, owner.numel()).inverse


class RoutedPairs:
    """A :class:`PairExchange` by collectives.

    Args:
        group: the expert parallel group.
        draft: what this rank sends.
        table: (R, E + R) int64 on the CPU, the counts of all ranks' drafts.
        held: global ids of the experts of each rank.
        layer: the layer's name.
    """

    def __init__(
        self,
        group: ExpertGroup,
        draft: RankDraft,
        table: Tensor,
        held: Sequence[Sequence[int]],
        layer: str,
    ) -> None:
        self.num_local = len(held[group.rank])
        self._draft, self._num_experts = draft, table.shape[1] - group.size
        rows = table[:, self._num_experts :]
        pairs = torch.stack([table[:, ids].sum(1) for ids in held], dim=1)
        sizes = [
            (each[group.rank].tolist(), each[:, group.rank].tolist()) for each in (rows, pairs)
        ]
        self._there, self._of_pairs = (
            Route(dist.all_to_all_single, group, *both, layer, "dispatch") for both in sizes
        )
        self._plan = draft.plan(sum(self._there.send))

    @property
    def of_experts(self) -> Tensor:
        """See :class:`PairExchange`."""
        return self._draft.counts[: self._num_experts]

    def send_tokens(self, x: Tensor, weights: Tensor) -> SentTokens:
        """See :class:`PairExchange`."""
        rows, by_slot, ids = send_tokens(x, weights, self._plan, self._there)()
        keys = torch.where(ids < 0, self.num_local, ids).long()
        return SentTokens(rows, by_slot, keys, sum(self._of_pairs.receive))

    def places(self) -> Tensor:
        """See :class:`PairExchange`."""
        return places_of(self._draft.owner, self._draft.ranks)

    def return_rows(self, parts: Sequence[Tensor], pairs: ArrivedPairs, phase: str) -> list[Tensor]:
        """See :class:`PairExchange`."""
        back = self._of_pairs.reversed(phase)
        return [back.run(part.index_select(0, pairs.sent)) for part in parts]

    def send_gradient(self, grad: Tensor) -> Tensor:
        """See :class:`PairExchange`."""
        there = self._there.reversed(COMBINE).back()
        return there.run(grad.index_select(0, self._plan.token))
