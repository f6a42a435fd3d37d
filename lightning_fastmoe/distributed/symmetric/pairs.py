"""Rows per (token, slot) pair that come back through symmetric memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fastmoe.distributed.dispatch.pair_exchange import (
    ArrivedPairs,
    SentTokens,
    places_of,
)
from lightning_fastmoe.distributed.symmetric.exchange import SymmetricExchange
from lightning_fastmoe.distributed.symmetric.tokens import Passage


class PairPassage(Passage):
    """A :class:`~lightning_fastmoe.distributed.dispatch.pair_exchange.PairExchange` of one pass.

    Args:
        exchange: of the group.
        chosen: (T, K) int64, experts; E for dropped slots.
        where: (2, E + 1) int64, each expert's rank and its number there; R and -1 for E.
        held: global ids of the experts of each rank.
        returned: the widest dtype of rows that come back.
        layer: the layer's name.
    """

    def __init__(
        self,
        exchange: SymmetricExchange,
        chosen: Tensor,
        where: Tensor,
        held: Sequence[Sequence[int]],
        returned: torch.dtype,
        layer: str,
    ) -> None:
        super().__init__(exchange, chosen, where, len(held[exchange.group.rank]), layer)
        self._held, self._widest = held, returned
        self._row_bytes = 0
        self._of_ranks: list[int] = []

    def _needs(self, tokens: int) -> int:
        # One rank may have the experts of all slots of all tokens. With their gradients come those
        # of the weights.
        back = [self._row_bytes, self._weights_dtype.itemsize]
        slots = self._chosen.shape[1]
        return max(super()._needs(tokens), self._exchange.needs(tokens * slots, back))

    @property
    def of_experts(self) -> Tensor:
        """See the protocol."""
        return self.plan.of_experts

    def send_tokens(self, x: Tensor, weights: Tensor) -> SentTokens:
        """See the protocol."""
        self._row_bytes = x.shape[1] * self._widest.itemsize
        came = self.dispatch(x, weights)
        own = self.counts[self._exchange.group.rank]
        self._of_ranks = [int(own[ids].sum()) for ids in self._held]
        return SentTokens(*came, self.sizes(self._held[self._exchange.group.rank]).pairs)

    def places(self) -> Tensor:
        """See the protocol."""
        return places_of(self.plan.owner, self._ranks)

    def return_rows(self, parts: Sequence[Tensor], pairs: ArrivedPairs, phase: str) -> list[Tensor]:
        """See the protocol."""
        per_row = (pairs.order.inverse >= 0).view(-1, self._chosen.shape[1]).sum(1)
        before = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
        ends = before.index_select(0, self._ends.long()).to(torch.int32)
        sent = [part.contiguous().view(torch.uint8) for part in parts]
        widths = [part.shape[1] for part in sent]
        ones = [1] * len(sent)
        self._exchange.send(sent, pairs.sent, ones, ends, self._begin(widths, phase))
        blocks = self._arrival(widths, phase).parts
        return [
            one.together(self._of_ranks).view(part.dtype)
            for one, part in zip(blocks, parts, strict=True)
        ]

    def send_gradient(self, grad: Tensor) -> Tensor:
        """See the protocol."""
        return self.combine_backward(grad)
