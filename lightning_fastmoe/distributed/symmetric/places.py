"""Where what is exchanged goes and arrives, in bytes of the ranks' memory, and how much it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_fastmoe.ops.exchange_arrival import Blocks


@dataclass(frozen=True)
class Arrival:
    """What has arrived in this rank's memory; others will write to it in exchanges to come.

    Attributes:
        parts: the blocks of each part, with room for :attr:`most` rows of each rank.
        ranks: R.
        most: rows of a rank that there is room for.
    """

    parts: Sequence[Blocks]
    ranks: int
    most: int

    def evenly_spaced(self, part: int, counts: Sequence[int]) -> tuple[Tensor, int]:
        """The rows of a part, with room for equally many of each rank; and how many that is.

        A view where the ranks' blocks are multiples of a row, else a copy. Only what ranks sent
        has values.

        Args:
            part: which part.
            counts: rows from each rank.

        Returns:
            (R * most, w) uint8; and ``most``.
        """
        blocks = self.parts[part]
        if blocks.block_bytes == self.most * blocks.row_bytes:
            rows = self.ranks * self.most
            return Blocks(blocks.memory, blocks.at, 0, blocks.row_bytes).of(0, rows), self.most
        most = max(counts)
        copy = blocks.memory.new_zeros(self.ranks, most, blocks.row_bytes)
        for rank, count in enumerate(counts):
            copy[rank, :count] = blocks.of(rank, count)
        return copy.flatten(0, 1), most


@dataclass(frozen=True)
class Sizes:
    """What comes to a rank in a pass.

    Attributes:
        rows: of tokens, S'.
        pairs: (row, slot) pairs that chose an expert of this rank, N.
    """

    rows: int
    pairs: int

    def fit_into(self, most: Sizes) -> bool:
        """Whether there are not more of either."""
        return self.rows <= most.rows and self.pairs <= most.pairs


class CountsPlace(NamedTuple):
    """Where the counts of an exchange go.

    Attributes:
        number: of the exchange, the same on all ranks.
        own: the byte of each rank's memory at which this rank's vector begins.
        flags: the byte at which the flags begin.
        value: of the flags.
    """

    number: int
    own: int
    flags: int
    value: int


class RowsPlace(NamedTuple):
    """Where the rows of an exchange go; a place for each part.

    Attributes:
        own: the byte of each rank's memory at which this rank's rows begin.
        begins: the byte at which the first rank's begin.
        blocks: bytes from one rank's rows to the next one's.
        most: rows of a rank that there is room for.
        flags: the byte at which the flags begin.
        value: of the flags.
    """

    own: list[int]
    begins: list[int]
    blocks: list[int]
    most: int
    flags: int
    value: int
