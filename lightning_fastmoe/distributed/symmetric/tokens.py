"""Tokens to their experts' ranks and sums back through symmetric memory, with their gradients.

Each way is one autograd node, which waits for what it brings. The gradients go the same ways back:
those of the sums in the places of the tokens, those of the tokens in the places of the sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe.distributed.symmetric.exchange import Part, SymmetricExchange
from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.exchange_plan import PairPlan, plan_pairs, unpack_pairs

_BACKWARD = " (backward)"


class Passage:
    """One pass of tokens through a layer: what this rank sends and what it gets.

    Args:
        exchange: of the group.
        chosen: (T, K) int64, experts; E for dropped slots.
        where: (2, E + 1) int64, each expert's rank and its number there; R and -1 for E.
        num_local: e, the experts of this rank.
        layer: the layer's name.

    Attributes:
        counts: (R, E + R) int64 on the CPU, of all ranks: the tokens of each expert, then the rows
            to each rank; after :func:`send_tokens`.
    """

    counts: Tensor
    _plan: PairPlan
    _ends: Tensor

    def __init__(
        self, exchange: SymmetricExchange, chosen: Tensor, where: Tensor, num_local: int, layer: str
    ) -> None:
        self._exchange, self._chosen, self._where, self._layer = exchange, chosen, where, layer
        self._num_local = num_local
        self._ranks = exchange.group.size
        self._call = 0
        self._sent: list[int] = []
        self._received: list[int] = []

    def dispatch(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pushes tokens before any count is known; see :func:`send_tokens`.

        The device stands still from the end of the rows' way until the host, which waits for the
        counts, has launched what follows: so whatever doesn't need them is launched before.
        """
        exchange, layer, ranks = self._exchange, self._layer, self._ranks
        plan, packed = plan_pairs(self._chosen, self._where, weights, ranks)
        self._plan = plan
        widths = [x.shape[1] * x.element_size(), packed.shape[1]]
        needed = exchange.needs(len(x), widths)
        asked = torch.full((1,), needed, dtype=torch.int64, device=x.device)
        counts = torch.cat([plan.counts, asked])
        self._call = exchange.send_counts(counts, x.shape[1], layer)
        parts = [*self._of_tokens(x), Part(packed, plan.order)]
        if needed <= exchange.capacity:
            self._push(parts, "dispatch")
        else:
            exchange.skip_rows()
        table = exchange.read_counts(len(counts), layer)
        most = int(table[:, -1].max())
        if most > exchange.capacity:  # all ranks see it
            exchange.grow(most)
            self._push(parts, "dispatch")
        rank = exchange.group.rank
        self.counts = table[:, :-1]
        of_ranks = self.counts[:, -ranks:]
        self._sent, self._received = of_ranks[rank].tolist(), of_ranks[:, rank].tolist()
        ends = of_ranks[:, rank].cumsum(0).to(torch.int32)
        self._ends = ends.to(x.device, non_blocking=True)
        with exchange.arrival(widths, layer, "dispatch") as arrived:
            rows = arrived.copy(0, self._received)
            wide, keys = unpack_pairs(
                arrived.memory,
                arrived.at[1],
                arrived.block_bytes(1),
                self._ends,
                self._received,
                weights.shape[1],
                self._num_local,
                weights.dtype,
            )
        return rows.view(x.dtype), wide, keys

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
        d_x, slot_places, (by_row,) = self._back("dispatch" + _BACKWARD, d_rows, d_weights)
        slots = kernels.rows_or_zeros(by_row.reshape(-1), slot_places)
        return d_x, slots.view(self._chosen.shape)

    def _of_tokens(self, x: Tensor) -> list[Part]:
        rows = x.contiguous().view(torch.uint8)
        return [Part(rows, self._plan.order, self._ranks)]

    def _push(self, parts: list[Part], phase: str) -> None:
        self._exchange.send(parts, self._plan.ends, self._layer, phase, self._call)

    def _back(
        self, phase: str, rows: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Sends a row of each tensor for each row that came here, and gets those for ours.

        Returns:
            Each token's sum over ranks of ``rows``, in the order of ranks, in fp32;
            :meth:`PairPlan.places` of slots; and the others by row.
        """
        tensors = (rows, *others)
        parts = [Part(tensor.contiguous().view(torch.uint8)) for tensor in tensors]
        widths = [part.row_bytes for part in parts]
        self._exchange.send(parts, self._ends, self._layer, phase, self._call)
        in_place = self._exchange.has_common_distance(widths[0])
        most = self._exchange.most(widths)
        places, slot_places = self._plan.places(most if in_place else max(self._sent))
        with self._exchange.arrival(widths, self._layer, phase) as arrived:
            found = [arrived.copy(i + 1, self._sent).view(t.dtype) for i, t in enumerate(others)]
            here = arrived.in_place(0) if in_place else arrived.padded(0, self._sent)
            sums = kernels.sum_placed_rows(here.view(rows.dtype), places, self._ranks)
        return sums, slot_places, found


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
