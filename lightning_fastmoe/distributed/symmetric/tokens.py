"""Tokens to their experts' ranks and sums back through symmetric memory, with their gradients.

Each way is one autograd node, which waits for what it brings. The gradients go the same ways back:
those of the sums in the places of the tokens, those of the tokens in the places of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fastmoe.distributed.symmetric.exchange import SymmetricExchange
from lightning_fastmoe.ops.exchange_arrival import Blocks, of_slots, receive, sum_of_ranks
from lightning_fastmoe.ops.exchange_plan import PairPlan, plan_pairs

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
        parts, divisors = [_bytes(x), packed], [ranks, 1]
        widths = [part.shape[1] for part in parts]
        needed = exchange.needs(len(x), widths)
        self._call = exchange.send_counts(plan.of_experts, plan.of_ranks, needed, x.shape[1], layer)
        if needed <= exchange.capacity:
            self._push(parts, divisors, "dispatch")
        else:
            exchange.skip_rows()
        columns = len(plan.of_experts) + ranks
        table = exchange.read_counts(columns + 1, layer)
        most = int(table[:, columns].max())
        if most > exchange.capacity:  # all ranks see it
            exchange.grow(most)
            self._push(parts, divisors, "dispatch")
        self.counts = table[:, :columns]
        of_ranks = self.counts[:, -ranks:]
        rank = exchange.group.rank
        self._sent, self._received = of_ranks[rank].tolist(), of_ranks[:, rank].tolist()
        arrived = exchange.arrival(widths, layer, "dispatch")
        of_rows, of_packed = arrived.parts
        rows, wide, keys, self._ends = receive(
            of_rows, self._received, of_packed, self._num_local, weights.dtype
        )
        return rows.view(x.dtype), wide, keys

    def combine(self, sums: Tensor) -> Tensor:
        """``sums (S', D) -> (T, D)``, each token's sum over ranks."""
        return self._back("combine", sums)[0]

    def combine_backward(self, grad: Tensor) -> Tensor:
        """``(T, D) -> (S', D)``, the gradient of each row's sums."""
        parts, phase = [_bytes(grad)], "combine" + _BACKWARD
        self._push(parts, [self._ranks], phase)
        (rows,) = self._exchange.arrival([parts[0].shape[1]], self._layer, phase).parts
        return receive(rows, self._received).rows.view(grad.dtype)

    def dispatch_backward(self, d_rows: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        """``(S', D), (S', K) -> (T, D), (T, K)``, the gradients of tokens and weights."""
        d_x, (_, by_row) = self._back("dispatch" + _BACKWARD, d_rows, d_weights)
        return d_x, of_slots(by_row, self._plan, d_weights.dtype)

    def _push(self, parts: list[Tensor], divisors: list[int], phase: str) -> None:
        plan = self._plan
        self._exchange.send(parts, plan.order, divisors, plan.ends, self._layer, phase, self._call)

    def _back(self, phase: str, *tensors: Tensor) -> tuple[Tensor, Sequence[Blocks]]:
        """Sends a row of each tensor for each row that came here, and gets those for ours.

        Returns:
            Each token's sum over ranks of the first's, in the order of ranks, in fp32; and where
            all of them are.
        """
        parts = [_bytes(tensor) for tensor in tensors]
        widths = [part.shape[1] for part in parts]
        self._exchange.send(
            parts, None, [1] * len(parts), self._ends, self._layer, phase, self._call
        )
        arrived = self._exchange.arrival(widths, self._layer, phase)
        rows, most = arrived.evenly_spaced(0, self._sent)
        return sum_of_ranks(rows.view(tensors[0].dtype), self._plan, most), arrived.parts


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
