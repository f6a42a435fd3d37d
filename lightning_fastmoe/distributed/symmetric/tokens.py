"""Tokens to their experts' ranks and sums back through symmetric memory, with their gradients.

Each way is one autograd node, which waits for what it brings. The gradients go the same ways back:
those of the sums in the places of the tokens, those of the tokens in the places of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe.distributed.symmetric.exchange import SymmetricExchange
from lightning_fastmoe.distributed.symmetric.places import Arrival, CountsPlace, RowsPlace, Sizes
from lightning_fastmoe.ops.exchange_arrival import (
    Blocks,
    Received,
    of_slots,
    receive,
    receive_ahead,
    sum_of_ranks,
)
from lightning_fastmoe.ops.exchange_plan import ID_BYTES, PairPlan, plan_pairs

DISPATCH, COMBINE, BACKWARD = "dispatch", "combine", " (backward)"


class Passage:
    """One pass of tokens through a layer: what this rank sends and what it gets.

    Args:
        exchange: of the group.
        chosen: (T, K) int64, experts; E for dropped slots.
        where: (2, E + 1) int64, each expert's rank and its number there; R and -1 for E.
        num_local: e, the experts of this rank.
        layer: the layer's name.

    Attributes:
        num_local: e.
        counts: (R, E + R) int64, of all ranks: the tokens of each expert, then the rows to each
            rank; after :meth:`settle`.
        plan: what this rank sends; after :meth:`start`.
    """

    counts: NDArray[np.int64]
    plan: PairPlan
    _ends: Tensor
    _place: RowsPlace

    def __init__(
        self, exchange: SymmetricExchange, chosen: Tensor, where: Tensor, num_local: int, layer: str
    ) -> None:
        self._exchange, self._chosen, self._where, self._layer = exchange, chosen, where, layer
        self.num_local = num_local
        self._ranks = exchange.group.size
        self._call = 0
        self._sent: list[int] = []
        self._received: list[int] = []
        self._parts: list[Tensor] = []
        self._widths: list[int] = []
        self._weights_dtype = torch.float32

    def start(self, x: Tensor, weights: Tensor) -> bool:
        """Pushes tokens before any count is known; :meth:`settle` must follow.

        Returns:
            Whether there was room for them.
        """
        exchange, layer, rows = self._exchange, self._layer, _bytes(x)
        packed_bytes = weights.shape[1] * (ID_BYTES + weights.element_size())
        self._widths, self._weights_dtype = [rows.shape[1], packed_bytes], weights.dtype
        needed = self._needs(len(x))
        fits = needed <= exchange.capacity
        counts = exchange.begin_counts(layer)
        self._call = counts.number
        self._place = exchange.begin_rows(self._widths, layer, DISPATCH, self._call)
        self.plan, packed = self._launch(rows, weights, x.shape[1], counts, needed, fits=fits)
        self._parts = [rows, packed]
        return fits

    def _launch(
        self,
        rows: Tensor,
        weights: Tensor,
        width: int,
        counts: CountsPlace,
        needed: int,
        *,
        fits: bool,
    ) -> tuple[PairPlan, Tensor]:
        """Plans, sends counts and, if they fit, rows, and starts to read the counts."""
        exchange, layer = self._exchange, self._layer
        plan, packed = plan_pairs(self._chosen, self._where, weights, self._ranks)
        exchange.announce(plan.of_experts, plan.of_ranks, needed, width, layer, counts)
        if fits:
            parts = [rows, packed]
            exchange.send(parts, plan.order, [self._ranks, 1], plan.ends, self._place)
        else:
            exchange.send_nothing(self._place)
        exchange.start_reading(layer)
        return plan, packed

    def _needs(self, tokens: int) -> int:
        """The bytes that a rank must have room for, from each rank, to take part in this pass."""
        return self._exchange.needs(tokens, self._widths)

    def settle(self) -> bool:
        """Waits until the host knows the counts. Sends tokens again if a rank had no room for them.

        Returns:
            Whether that was so.
        """
        exchange, ranks, rank = self._exchange, self._ranks, self._exchange.group.rank
        columns = len(self.plan.of_experts) + ranks
        table = exchange.read_counts(columns + 1, self._layer)
        most = int(table[:, columns].max())
        is_short = most > exchange.capacity  # all ranks see it
        if is_short:
            exchange.grow(most)
            self._push(self._parts, [ranks, 1], DISPATCH)
        self._parts = []  # the graph keeps this object, and needs none of them
        self.counts = table[:, :columns]
        of_ranks = self.counts[:, -ranks:]
        self._sent, self._received = of_ranks[rank].tolist(), of_ranks[:, rank].tolist()
        return is_short

    def sizes(self, held: Sequence[int]) -> Sizes:
        """What has come to this rank, after :meth:`settle`.

        Args:
            held: global ids of its experts.
        """
        return Sizes(sum(self._received), int(self.counts[:, held].sum()))

    def receive(self) -> Received:
        """The tokens that came here, after :meth:`settle`."""
        rows, packed = self._arrival(self._widths, DISPATCH).parts
        found = receive(rows, self._received, packed, self.num_local, self._weights_dtype)
        self._ends = found.ends
        return found

    def receive_ahead(self, sizes: Sizes) -> Received:
        """The tokens that come here, before :meth:`settle`.

        Args:
            sizes: what to expect at most.
        """
        arrived, expected = self._exchange.arrival_ahead(
            self._widths, self._layer, DISPATCH, self._place, self._where, sizes
        )
        rows, packed = arrived.parts
        found = receive_ahead(rows, packed, self.num_local, self._weights_dtype, expected)
        self._ends = found.ends
        return found

    def dispatch(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sends tokens and waits for those that come here; see :func:`send_tokens`."""
        self.start(x, weights)
        self.settle()
        found = self.receive()
        return found.rows.view(x.dtype), found.weights, found.keys

    def combine(self, sums: Tensor) -> Tensor:
        """``sums (S', D) -> (T, D)``, each token's sum over ranks."""
        self._send_back(COMBINE, sums)
        return self._sums(COMBINE, [sums])[0]

    def combine_backward(self, grad: Tensor) -> Tensor:
        """``(T, D) -> (S', D)``, the gradient of each row's sums."""
        parts, phase = [_bytes(grad)], COMBINE + BACKWARD
        self._push(parts, [self._ranks], phase)
        (rows,) = self._arrival([parts[0].shape[1]], phase).parts
        return receive(rows, self._received).rows.view(grad.dtype)

    def send_gradients(self, d_rows: Tensor, d_weights: Tensor) -> None:
        """``(S', D)`` and ``(S', K)``, the gradients of rows and weights, to their tokens' ranks.

        :meth:`receive_gradients` must follow.
        """
        self._send_back(DISPATCH + BACKWARD, d_rows, d_weights)
        self._returned = d_rows, d_weights

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """``(T, D), (T, K)``, the gradients of tokens and weights."""
        d_rows, d_weights = self._returned
        del self._returned
        d_x, (_, by_row) = self._sums(DISPATCH + BACKWARD, [d_rows, d_weights])
        return d_x, of_slots(by_row, self.plan, d_weights.dtype)

    def _begin(self, widths: Sequence[int], phase: str) -> RowsPlace:
        self._place = self._exchange.begin_rows(widths, self._layer, phase, self._call)
        return self._place

    def _push(self, parts: list[Tensor], divisors: list[int], phase: str) -> None:
        plan, place = self.plan, self._begin([part.shape[1] for part in parts], phase)
        self._exchange.send(parts, plan.order, divisors, plan.ends, place)

    def _send_back(self, phase: str, *tensors: Tensor) -> None:
        """Sends a row of each tensor for each row that came here."""
        parts = [_bytes(tensor) for tensor in tensors]
        place = self._begin([part.shape[1] for part in parts], phase)
        self._exchange.send(parts, None, [1] * len(parts), self._ends, place)

    def _arrival(self, widths: Sequence[int], phase: str) -> Arrival:
        return self._exchange.arrival(widths, self._layer, phase, self._place)

    def _sums(self, phase: str, like: Sequence[Tensor]) -> tuple[Tensor, Sequence[Blocks]]:
        """Receives what all ranks have sent back.

        Returns:
            Each token's sum over ranks of the first's, in the order of ranks, in fp32; and where
            all of them are.
        """
        widths = [tensor.shape[1] * tensor.element_size() for tensor in like]
        arrived = self._arrival(widths, phase)
        rows, most = arrived.evenly_spaced(0, self._sent)
        return sum_of_ranks(rows.view(like[0].dtype), self.plan, most), arrived.parts


def _bytes(rows: Tensor) -> Tensor:
    """(n, w) uint8."""
    return rows.contiguous().view(torch.uint8)


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, passage: Passage
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.passage = passage
        rows, wide, keys = passage.dispatch(x, weights)
        ctx.mark_non_differentiable(keys)
        return rows, wide, keys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.passage.send_gradients(*grads[:2])
        return *ctx.passage.receive_gradients(), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        return passage.combine(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.passage.combine_backward(grads[0]), None


def send_tokens(x: Tensor, weights: Tensor, passage: Passage) -> tuple[Tensor, Tensor, Tensor]:
    """Sends each token once per rank, with the experts and weights of its slots.

    Args:
        x: (T, D).
        weights: (T, K).
        passage: of this call alone.

    Returns:
        ``rows (S', D)``, ``weights (S', K)`` and ``keys (S', K)``, int64, the local expert that
        each slot chose, e if another rank's.
    """
    return _Tokens.apply(x, weights, passage)  # type: ignore[no-any-return]


def return_sums(sums: Tensor, passage: Passage) -> Tensor:
    """Sends the rows' results back.

    Args:
        sums: (S', D), one for each row that arrived.
        passage: of :func:`send_tokens`.

    Returns:
        (T, D), each token's sum over ranks.
    """
    return _Sums.apply(sums, passage)  # type: ignore[no-any-return]
