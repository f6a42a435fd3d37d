"""Exchanges between the ranks of a group through symmetric memory.

There are two kinds, each with its own flags and memory: one of token counts, which the host reads,
and one of rows. Exchange n of a kind is, on each rank, in the order of the stream:

1. push rows to where they belong, then set this rank's flag n of all ranks;
2. wait until all ranks have set their flag n here;
3. read what has arrived.

The next exchange uses the other half of the memory, and that is all that keeps a rank from writing
to what another still reads: for n + 2 it has waited for everybody's flag n + 1, which each sets
after it has read n. All ranks make the same exchanges in the same order; the tags of flags and
the header of the counts detect it if not.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.distributed.dispatch import ExpertGroup
from lightning_fastmoe.distributed.dispatch.counts import header, unpack_counts
from lightning_fastmoe.distributed.symmetric.flags import Flags, Table
from lightning_fastmoe.distributed.symmetric.memory import (
    SymmetricMemory,
    check_reachable,
    refuse_unless_all_can,
)
from lightning_fastmoe.distributed.symmetric.stream_order import StreamOrder
from lightning_fastmoe.ops import exchange as ops
from lightning_fastmoe.ops import exchange_counts as counts
from lightning_fastmoe.ops.exchange_arrival import Blocks, Expected
from lightning_fastmoe.ops.exchange_counts import HEADER

MAX_SLOTS = 4096
"""Most numbers that the ranks' counts may have."""
_COUNTS_BYTES = 8 * (MAX_SLOTS + HEADER)
_GRANULE = 1 << 16
_HALVES = 2


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


@dataclass
class _Kind:
    """One kind of exchange, and the latest.

    Attributes:
        first_line: where its flags are, a line for each half.
        number: how many exchanges there have been.
        tag: what the latest is about.
    """

    first_line: int
    number: int = 0
    tag: int = 0

    @property
    def half(self) -> int:
        return self.number % _HALVES

    @property
    def line(self) -> int:
        return self.first_line + self.half

    @property
    def value(self) -> int:
        return self.number << ops.TAG_BITS | self.tag


class SymmetricExchange:
    """Exchanges of one expert parallel group; one object for all layers of a model.

    Args:
        group: the expert parallel group; all its ranks call this at the same point.
        device: where rows are.

    Attributes:
        rows: the memory that rows are pushed to; None until the first exchange.

    Raises:
        TopologyError: on all ranks, if one can't reach the memory of the others.
    """

    def __init__(self, group: ExpertGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        check_reachable(group.group, device)
        kinds = 2
        self._flag_bytes = Flags.bytes_of(_HALVES * kinds, group.size)
        size = self._flag_bytes + _HALVES * group.size * _COUNTS_BYTES
        self._control = SymmetricMemory(group.group, size, device)
        self._control.own.zero_()
        self._meet()  # no flag comes before the zeros
        self._flags = Flags(group, self._control)
        self._counts, self._rows = (_Kind(_HALVES * kind) for kind in range(kinds))
        self.rows: SymmetricMemory | None = None
        self.capacity = 0  # bytes of a half for the rows of one rank
        self._aside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._nothing = torch.empty(0, dtype=torch.int64, device=device)
        self._order = StreamOrder(device)
        group.other_way = self.exchange_counts
        group.on_giving_up.append(self._flags.give_up)

    @classmethod
    def of(cls, group: ExpertGroup) -> SymmetricExchange:
        """The exchange of a group, made at the first call; all its ranks call this.

        Raises:
            TopologyError: see the class.
        """
        if cls not in group.shared:
            device = torch.device("cpu")
            if group.is_on_stream:
                device = torch.device("cuda", torch.cuda.current_device())
            group.shared[cls] = cls(group, device)
        found: SymmetricExchange = group.shared[cls]
        return found

    def exchange_counts(self, own: Tensor, width: int, layer: str) -> Tensor | None:
        """:meth:`ExpertGroup.exchange_counts`; None if there is no room for the model's counts."""
        if self.group.slots > MAX_SLOTS:  # the same on all ranks
            return None
        here = own.to(self.device, non_blocking=True)
        self.send_counts(here, self._nothing, None, width, layer)
        self.start_reading(layer)
        return self.read_counts(len(here), layer)

    def send_counts(
        self, of_experts: Tensor, of_ranks: Tensor, needed: int | None, width: int, layer: str
    ) -> int:
        """Sends this rank's counts to all; :meth:`start_reading` must follow.

        The counts must live until then: they are sent by another stream than the current one, so
        that they pass the rows.

        Args:
            of_experts: (n,) int64.
            of_ranks: (m,) int64.
            needed: one more number, or None.
            width: D, which must be the same on all ranks.
            layer: the layer's name.

        Returns:
            The number of this exchange, the same on all ranks.
        """
        kind = self._begin(self._counts, layer, "counts", tag=0)
        self._order.follow()  # others may write to the other half then: it has been read
        counts.announce(
            *(of_experts, of_ranks, needed, header(layer, kind.number, width), self._slots),
            *(self._control.ranks, self.group.rank, self._counts_at(self.group.rank)),
            *(self._flags.at(kind.line), kind.value),
            0 if self._aside is None else self._aside.cuda_stream,
        )
        return kind.number

    def start_reading(self, layer: str) -> None:
        """The device waits for the counts of all ranks; :meth:`read_counts` must follow."""
        kind = self._counts
        where = self.group.where(layer, "counts")
        self._flags.start_reading(kind.line, kind.value, self._table, where)

    def read_counts(self, count: int, layer: str) -> Tensor:
        """The host waits for the counts of all ranks.

        Args:
            count: n.
            layer: the layer's name.

        Returns:
            (R, n) int64, on the CPU.

        Raises:
            ExchangeError: as :meth:`ExpertGroup.exchange_counts`.
        """
        kind = self._counts
        with self.group.pending(layer, "counts"):
            where = self.group.where(layer, "counts")
            found = self._flags.finish_reading(kind.line, kind.value, self._table, where)
        try:
            return unpack_counts(found, count, layer)
        except BaseException:
            if self._aside is not None:  # a rank that reads ahead waits for rows
                self._flags.give_up()
            raise

    @property
    def _table(self) -> Table:
        place = (self._counts_at(0), _COUNTS_BYTES)
        return Table(place, HEADER + self._slots, self._aside)

    def needs(self, most: int, widths: Sequence[int]) -> int:
        """Bytes for ``most`` rows of each of these numbers of bytes."""
        return max(most, 1) * sum(map(_aligned, widths))

    def send(
        self,
        parts: Sequence[Tensor],
        order: Tensor | None,
        divisors: Sequence[int],
        ends: Tensor,
        layer: str,
        phase: str,
        call: int,
    ) -> None:
        """Pushes rows to their ranks; :meth:`arrival` must follow, unless a rank had to skip it.

        Args:
            parts: each (n, w) uint8, contiguous; their rows go to the same ranks, and must fit into
                :attr:`capacity`.
            order: (N,) int64, the rows to send by rank, each times the part's divisor; None sends
                the parts as they are.
            divisors: of each part.
            ends: (R,) int32, where the rows for each rank end.
            layer: the layer's name.
            phase: what is exchanged.
            call: the same number on all ranks; ranks with different ones end in an error, as do
                those with rows of different lengths.
        """
        assert self.rows is not None
        widths = [part.shape[1] for part in parts]
        kind = self._begin_rows(widths, layer, phase, call)
        most, at = self._layout(widths)
        own = [
            begin + self.group.rank * most * _aligned(width)
            for begin, width in zip(at, widths, strict=True)
        ]
        ops.send_rows(
            *(parts, order, divisors, ends, self.rows.ranks, self.group.rank, own, most),
            *(self._control.ranks, self._flags.at(kind.line), kind.value),
        )

    def send_nothing(self, widths: Sequence[int], layer: str, phase: str, call: int) -> None:
        """In place of :meth:`send`, on a rank whose rows don't fit. None may receive then.

        Sets the flags nonetheless: ranks that read ahead wait for them.
        """
        kind = self._begin_rows(widths, layer, phase, call)
        line = self._flags.at(kind.line)
        ops.set_flags(self._control.ranks, self.group.rank, line, kind.value)

    def arrival(self, widths: Sequence[int], layer: str, phase: str) -> Arrival:
        """Waits for the rows of all ranks, which may be read until the next exchange.

        Args:
            widths: bytes of a row of each part, as sent.
            layer: the layer's name.
            phase: what is exchanged.
        """
        return self._arrival(widths, layer, phase, fatal=True)

    def arrival_ahead(
        self, widths: Sequence[int], layer: str, phase: str, where: Tensor, sizes: Sizes
    ) -> tuple[Arrival, Expected]:
        """:meth:`arrival` of rows whose counts the host doesn't know yet.

        Args:
            widths: see :meth:`arrival`.
            layer: the layer's name.
            phase: what is exchanged.
            where: (2, E + 1) int64, each expert's rank.
            sizes: what to expect at most.
        """
        self._flags.follow_reading()
        found = self._arrival(widths, layer, phase, fatal=False)
        kinds = (self._counts, self._rows)
        return found, Expected(
            self._control.own,
            [(self._flags.at(kind.line), kind.value) for kind in kinds],
            (self._counts_at(0), _COUNTS_BYTES, 8 * HEADER),
            *(where, self.group.rank, self.group.size, self.capacity, found.most),
            *(sizes.rows, sizes.pairs),
        )

    def _arrival(self, widths: Sequence[int], layer: str, phase: str, *, fatal: bool) -> Arrival:
        assert self.rows is not None
        kind = self._rows
        with self.group.pending(layer, phase):
            where = self.group.where(layer, phase)
            self._flags.wait(kind.line, kind.value, where, fatal=fatal)
        most, at = self._layout(widths)
        blocks = [
            Blocks(self.rows.own, begin, most * _aligned(width), width)
            for begin, width in zip(at, widths, strict=True)
        ]
        return Arrival(blocks, self.group.size, most)

    def grow(self, needed: int) -> None:
        """Makes room for ``needed`` bytes from each rank; all ranks call this with one number.

        Raises:
            TopologyError: on all ranks, if one has no memory left for it.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._meet()  # whatever has been pushed is there: the old memory may go
        self.rows = None
        self.capacity = 0
        capacity = -(-(needed + needed // 8) // _GRANULE) * _GRANULE  # for a few tokens more, too
        size = _HALVES * self.group.size * capacity
        self.rows = SymmetricMemory(self.group.group, size, self.device)
        self.capacity = capacity

    @property
    def _slots(self) -> int:
        return min(self.group.slots, MAX_SLOTS)

    def _begin(self, kind: _Kind, layer: str, phase: str, tag: int) -> _Kind:
        with self.group.pending(layer, phase):
            self.group.wait.begin(self.group.where(layer, phase))
        self._flags.check()
        kind.number += 1
        kind.tag = tag
        return kind

    def _begin_rows(self, widths: Sequence[int], layer: str, phase: str, call: int) -> _Kind:
        kind = self._begin(self._rows, layer, phase, _tag(layer, phase, call, list(widths)))
        self._order.follow()
        return kind

    def _counts_at(self, rank: int) -> int:
        block = self._counts.half * self.group.size + rank
        return self._flag_bytes + block * _COUNTS_BYTES

    def _layout(self, widths: Sequence[int]) -> tuple[int, list[int]]:
        """(rows of a rank that there is room for, the byte at which each part begins)."""
        most = self.capacity // sum(map(_aligned, widths))
        at = [self._rows.half * self.group.size * self.capacity]
        for width in widths[:-1]:
            at.append(at[-1] + self.group.size * most * _aligned(width))
        return most, at

    def _meet(self) -> None:
        refuse_unless_all_can(self.group.group, None)


def _aligned(width: int) -> int:
    return -(-width // ops.ALIGNMENT) * ops.ALIGNMENT


def _tag(*what: object) -> int:
    """What must be the same on all ranks, as a number for a flag."""
    return zlib.crc32(repr(what).encode()) % (1 << ops.TAG_BITS)
