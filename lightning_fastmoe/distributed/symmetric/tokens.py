"""Tokens to their experts' ranks and sums back through symmetric memory, with their gradients.

Each way is one autograd node, which waits for what it brings. The gradients go the same ways back:
those of the sums in the places of the tokens, those of the tokens in the places of the sums.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe.distributed.dispatch.per_rank import RankDraft, RankPlan
from lightning_fastmoe.distributed.symmetric.exchange import Part, SymmetricExchange
from lightning_fastmoe.ops import kernels

_BACKWARD = " (backward)"
_ID_BYTES = 4


class Passage:
    """One pass of tokens through a layer: what this rank sends and what it gets.

    Args:
        exchange: of the group.
        draft: what is sent where.
        layer: the layer's name.

    Attributes:
        counts: (R, E + R) int64 on the CPU, of all ranks: the tokens of each expert, then the rows
            to each rank; after :func:`send_tokens`.
    """

    counts: Tensor
    _plan: RankPlan
    _ends: Tensor

    def __init__(self, exchange: SymmetricExchange, draft: RankDraft, layer: str) -> None:
        self._exchange, self._draft, self._layer = exchange, draft, layer
        self._call = 0
        self._sent: list[int] = []
        self._received: list[int] = []

    def dispatch(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pushes tokens before any count is known; see :func:`send_tokens`."""
        exchange, draft, layer = self._exchange, self._draft, self._layer
        slot_bytes = _ID_BYTES + weights.element_size()
        widths = [x.shape[1] * x.element_size(), weights.shape[1] * slot_bytes]
        needed = exchange.needs(len(x), widths)
        asked = torch.tensor([needed]).to(x.device, non_blocking=True)
        counts = torch.cat([draft.counts, asked])
        self._call = exchange.send_counts(counts, x.shape[1], layer)
        small = Part(draft.ids_and_weights(weights), draft.pairs.order)
        parts = [*self._of_tokens(x), small]
        if needed <= exchange.capacity:
            self._push(parts, "dispatch")
        else:
            exchange.skip_rows()
        table = exchange.read_counts(len(counts), layer)
        most = int(table[:, -1].max())
        if most > exchange.capacity:  # all ranks see it
            exchange.grow(most)
            self._push(parts, "dispatch")
        rank, ranks = exchange.group.rank, draft.ranks
        self.counts = table[:, :-1]
        of_ranks = self.counts[:, -ranks:]
        self._sent, self._received = of_ranks[rank].tolist(), of_ranks[:, rank].tolist()
        self._plan = draft.plan(sum(self._sent))
        ends = of_ranks[:, rank].cumsum(0).to(torch.int32)
        self._ends = ends.to(x.device, non_blocking=True)
        with exchange.arrival(widths, layer, "dispatch") as arrived:
            rows, packed = (arrived.copy(part, self._received) for part in range(2))
        # Clones, because the second part of a single row is contiguous but not aligned.
        ids, wide = (
            part.clone(memory_format=torch.contiguous_format)
            for part in packed.tensor_split([weights.shape[1] * _ID_BYTES], dim=1)
        )
        return rows.view(x.dtype), wide.view(weights.dtype), ids.view(torch.int32)

    def combine(self, sums: Tensor) -> Tensor:
        """``sums (S', D) -> (T, D)``, each token's sum over ranks."""
        return self._back("combine", sums)[0]

    def combine_backward(self, grad: Tensor) -> Tensor:
        """``(T, D) -> (S', D)``, the gradient of each row's sums."""
        parts = self._of_tokens(grad)
        phase = "combine" + _BACKWARD
        self._push(parts, phase)
        widths = [part.row_bytes for part in parts]
        with self._exchange.arrival(widths, self._layer, phase) as arrived:
            return arrived.copy(0, self._received).view(grad.dtype)

    def dispatch_backward(self, d_rows: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        """``(S', D), (S', K) -> (T, D), (T, K)``, the gradients of tokens and weights."""
        d_x, (by_row,) = self._back("dispatch" + _BACKWARD, d_rows, d_weights)
        return d_x, self._plan.slots_of_tokens(by_row)

    def _of_tokens(self, x: Tensor) -> list[Part]:
        rows = x.contiguous().view(torch.uint8)
        return [Part(rows, self._draft.pairs.order, self._draft.ranks)]

    def _push(self, parts: list[Part], phase: str) -> None:
        ends = self._draft.pairs.offsets[: self._draft.ranks]
        self._exchange.send(parts, ends, self._layer, phase, self._call)

    def _back(self, phase: str, rows: Tensor, *others: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Sends a row of each tensor for each row that came here, and gets those for ours.

        Returns:
            Each token's sum over ranks of ``rows``, and the others by row.
        """
        tensors = (rows, *others)
        parts = [Part(tensor.contiguous().view(torch.uint8)) for tensor in tensors]
        widths = [part.row_bytes for part in parts]
        self._exchange.send(parts, self._ends, self._layer, phase, self._call)
        with self._exchange.arrival(widths, self._layer, phase) as arrived:
            found = [arrived.copy(i + 1, self._sent).view(t.dtype) for i, t in enumerate(others)]
            if (here := arrived.in_place(0)) is None:
                copy = arrived.copy(0, self._sent).view(rows.dtype)
                return self._plan.sum_over_ranks(copy), found
            places = self._places(arrived.most)
            return kernels.sum_placed_rows(here.view(rows.dtype), places, self._plan.ranks), found

    def _places(self, most: int) -> Tensor:
        """(T*R,) the row of each (token, rank) pair, where each rank's rows have room for more."""
        begins = accumulate(self._sent[:-1], initial=0)
        shifts = torch.tensor([rank * most - begin for rank, begin in enumerate(begins)])
        place = self._plan.place.view(-1, self._plan.ranks)
        moved = place + shifts.to(place.device, non_blocking=True)
        return moved.masked_fill_(place < 0, -1).view(-1)


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, passage: Passage
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.passage = passage
        rows, wide, ids = passage.dispatch(x, weights)
        ctx.mark_non_differentiable(ids)
        return rows, wide, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.passage.dispatch_backward(*grads[:2]), None


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
        ``rows (S', D)``, ``weights (S', K)`` and ``ids (S', K)``, int32, the experts as in
        :attr:`RankPlan.ids`.
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
