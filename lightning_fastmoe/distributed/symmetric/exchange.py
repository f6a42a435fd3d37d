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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fastmoe.distributed.dispatch import ExpertGroup
from lightning_fastmoe.distributed.dispatch.counts import header, unpack_counts
from lightning_fastmoe.distributed.symmetric.flags import Flags, Table
from lightning_fastmoe.distributed.symmetric.memory import (
    SymmetricMemory,
    check_reachable,
    refuse_unless_all_can,
)
from lightning_fastmoe.distributed.symmetric.places import Arrival, CountsPlace, RowsPlace, Sizes
from lightning_fastmoe.distributed.symmetric.stream_order import StreamOrder
from lightning_fastmoe.ops import exchange as ops
from lightning_fastmoe.ops import exchange_counts as counts
from lightning_fastmoe.ops.exchange_arrival import Blocks, Expected
from lightning_fastmoe.ops.exchange_counts import HEADER

MAX_SLOTS = 4096
"""Most numbers that the ranks' counts may have."""
COUNTS_BYTES = 8 * (MAX_SLOTS + HEADER)
_GRANULE = 1 << 16
_HALVES = 2


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
        control: the memory of flags and counts.
        rows: the memory that rows are pushed to; None until the first exchange.
        capacity: bytes of :attr:`rows` for the rows of one rank in one exchange.
        flags: in :attr:`control`.
        aside: the stream that counts go and are read by; None on the CPU.
        order: keeps exchanges in order.

    Raises:
        TopologyError: on all ranks, if one can't reach the memory of the others.
    """

    def __init__(self, group: ExpertGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        check_reachable(group.group, device)
        kinds = 2
        self._flag_bytes = Flags.bytes_of(_HALVES * kinds, group.size)
        size = self._flag_bytes + _HALVES * group.size * COUNTS_BYTES
        self.control = SymmetricMemory(group.group, size, device)
        self.control.own.zero_()
        self._meet()  # no flag comes before the zeros
        self.flags = Flags(group, self.control)
        self._counts, self._rows = (_Kind(_HALVES * kind) for kind in range(kinds))
        self.rows: SymmetricMemory | None = None
        self.capacity = 0
        self._layouts: dict[tuple[int, ...], tuple[list[int], list[int], int]] = {}
        self.aside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._nothing = torch.empty(0, dtype=torch.int64, device=device)
        self.order = StreamOrder(device)
        group.other_way = self.exchange_counts
        group.on_giving_up.append(self.flags.give_up)

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
        # To the CPU (a group of gloo with tokens on a GPU) the host must wait, as it sends them.
        here = own.to(self.device, non_blocking=self.device.type == "cuda")
        place = self.begin_counts(layer)
        self.announce(here, self._nothing, None, width, layer, place)
        self.start_reading(layer)
        return torch.from_numpy(self.read_counts(len(here), layer))

    def begin_counts(self, layer: str) -> CountsPlace:
        """Begins an exchange of counts; :meth:`announce` and :meth:`start_reading` must follow."""
        self._begin(self._counts, layer, "counts", tag=0)
        self.order.follow()  # others may write to the other half then: it has been read
        return self.counts_place

    @property
    def counts_place(self) -> CountsPlace:
        """Of the latest exchange of counts."""
        kind, own = self._counts, self._counts_at(self.group.rank)
        return CountsPlace(kind.number, own, self.flags.at(kind.line), kind.value)

    def announce(
        self,
        of_experts: Tensor,
        of_ranks: Tensor,
        needed: int | None,
        width: int,
        layer: str,
        place: CountsPlace,
    ) -> None:
        """Sends this rank's counts to all.

        They must live until the host has read what all sent: they are sent by another stream than
        the current one, so that they pass the rows.

        Args:
            of_experts: (n,) int64.
            of_ranks: (m,) int64.
            needed: one more number, or None.
            width: D, which must be the same on all ranks.
            layer: the layer's name.
            place: of :meth:`begin_counts`.
        """
        counts.announce(
            *(of_experts, of_ranks, needed, header(layer, place.number, width), self.slots),
            *(self.control.ranks, self.group.rank, place.own, place.flags, place.value),
            self.stream,
        )

    def start_reading(self, layer: str, *, is_launched: bool = False) -> None:
        """The device waits for the counts of all ranks; :meth:`read_counts` must follow.

        Args:
            layer: the layer's name.
            is_launched: whether it does so already.
        """
        kind = self._counts
        where = self.group.where(layer, "counts")
        self.flags.start_reading(kind.line, kind.value, self.table, where, is_launched=is_launched)

    def read_counts(self, count: int, layer: str) -> NDArray[np.int64]:
        """The host waits for the counts of all ranks.

        Args:
            count: n.
            layer: the layer's name.

        Returns:
            (R, n).

        Raises:
            ExchangeError: as :meth:`ExpertGroup.exchange_counts`.
        """
        kind = self._counts
        with self.group.pending(layer, "counts"):
            where = self.group.where(layer, "counts")
            found = self.flags.finish_reading(kind.line, kind.value, self.table, where)
        try:
            return unpack_counts(found, count, layer)
        except BaseException:
            if self.aside is not None:  # a rank that reads ahead waits for rows
                self.flags.give_up()
            raise

    @property
    def stream(self) -> int:
        """:attr:`aside` as CUDA knows it; 0 on the CPU."""
        return 0 if self.aside is None else self.aside.cuda_stream

    @property
    def table(self) -> Table:
        """Where the counts of the latest exchange are."""
        return Table((self._counts_at(0), COUNTS_BYTES), HEADER + self.slots, self.aside)

    def needs(self, most: int, widths: Sequence[int]) -> int:
        """Bytes for ``most`` rows of each of these numbers of bytes."""
        return max(most, 1) * sum(map(_aligned, widths))

    def begin_rows(self, widths: Sequence[int], layer: str, phase: str, call: int) -> RowsPlace:
        """Begins an exchange of rows; :meth:`send` and :meth:`arrival` must follow.

        A rank whose rows don't fit calls :meth:`send_nothing`, and none may receive then.

        Args:
            widths: bytes of a row of each part.
            layer: the layer's name.
            phase: what is exchanged.
            call: the same number on all ranks; ranks with different ones end in an error, as do
                those with rows of different lengths.
        """
        widths = tuple(widths)
        kind = self._begin(self._rows, layer, phase, _tag(layer, phase, call, widths))
        self.order.follow()
        begins, blocks, most = self._layout(widths)
        half = kind.half * self.group.size * self.capacity
        return RowsPlace(
            [half + b + self.group.rank * block for b, block in zip(begins, blocks, strict=True)],
            [half + begin for begin in begins],
            blocks,
            *(most, self.flags.at(kind.line), kind.value),
        )

    def send(
        self,
        parts: Sequence[Tensor],
        order: Tensor | None,
        divisors: Sequence[int],
        ends: Tensor,
        place: RowsPlace,
    ) -> None:
        """Pushes rows to their ranks.

        Args:
            parts: each (n, w) uint8, contiguous; their rows go to the same ranks, and must fit into
                :attr:`capacity`.
            order: (N,) int64, the rows to send by rank, each times the part's divisor; None sends
                the parts as they are.
            divisors: of each part.
            ends: (R,) int32, where the rows for each rank end.
            place: of :meth:`begin_rows`.
        """
        assert self.rows is not None
        ops.send_rows(
            *(parts, order, divisors, ends, self.rows.ranks, self.group.rank),
            *(place.own, place.most, self.control.ranks, place.flags, place.value),
        )

    def send_nothing(self, place: RowsPlace) -> None:
        """Sets the flags nonetheless: ranks that read ahead wait for them."""
        ops.set_flags(self.control.ranks, self.group.rank, place.flags, place.value)

    def arrival(self, widths: Sequence[int], layer: str, phase: str, place: RowsPlace) -> Arrival:
        """Waits for the rows of all ranks, which may be read until the next exchange.

        Args:
            widths: bytes of a row of each part, as sent.
            layer: the layer's name.
            phase: what is exchanged.
            place: of :meth:`begin_rows`.
        """
        return self._arrival(widths, layer, phase, place, fatal=True)

    def arrival_ahead(
        self,
        widths: Sequence[int],
        layer: str,
        phase: str,
        place: RowsPlace,
        where: Tensor,
        sizes: Sizes,
    ) -> tuple[Arrival, Expected]:
        """:meth:`arrival` of rows whose counts the host doesn't know yet.

        Args:
            widths: see :meth:`arrival`.
            layer: the layer's name.
            phase: what is exchanged.
            place: see :meth:`arrival`.
            where: (2, E + 1) int64, each expert's rank.
            sizes: what to expect at most.
        """
        self.flags.follow_reading()
        found = self._arrival(widths, layer, phase, place, fatal=False)
        counts = self.counts_place
        return found, Expected(
            self.control.own,
            [(counts.flags, counts.value), (place.flags, place.value)],
            (*self.table.place, 8 * HEADER),
            *(where, self.group.rank, self.group.size, self.capacity, found.most),
            *(sizes.rows, sizes.pairs),
        )

    def _arrival(
        self, widths: Sequence[int], layer: str, phase: str, place: RowsPlace, *, fatal: bool
    ) -> Arrival:
        assert self.rows is not None
        with self.group.pending(layer, phase):
            where = self.group.where(layer, phase)
            self.flags.wait(place.flags, place.value, where, fatal=fatal)
        own = self.rows.own
        blocks = [
            Blocks(own, begin, block, width)
            for begin, block, width in zip(place.begins, place.blocks, widths, strict=True)
        ]
        return Arrival(blocks, self.group.size, place.most)

    def awaited(self, layer: str, phase: str, place: RowsPlace) -> None:
        """Notes that the current stream waits for rows, as :meth:`arrival` makes it do."""
        with self.group.pending(layer, phase):
            self.flags.awaited(place.value, self.group.where(layer, phase))

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
        self._layouts.clear()
        capacity = -(-(needed + needed // 8) // _GRANULE) * _GRANULE  # for a few tokens more, too
        size = _HALVES * self.group.size * capacity
        self.rows = SymmetricMemory(self.group.group, size, self.device)
        self.capacity = capacity

    @property
    def slots(self) -> int:
        """The numbers of each rank's vector of counts."""
        return min(self.group.slots, MAX_SLOTS)

    def _begin(self, kind: _Kind, layer: str, phase: str, tag: int) -> _Kind:
        with self.group.pending(layer, phase):
            self.group.wait.begin(self.group.where(layer, phase))
        self.flags.check()
        kind.number += 1
        kind.tag = tag
        return kind

    def _counts_at(self, rank: int) -> int:
        block = self._counts.half * self.group.size + rank
        return self._flag_bytes + block * COUNTS_BYTES

    def _layout(self, widths: tuple[int, ...]) -> tuple[list[int], list[int], int]:
        """(where each part begins in a half, bytes of a rank's block of each, rows of a rank)."""
        found = self._layouts.get(widths)
        if found is None:
            aligned = [_aligned(width) for width in widths]
            most = self.capacity // sum(aligned)
            blocks = [most * width for width in aligned]
            begins = [self.group.size * sum(blocks[:i]) for i in range(len(blocks))]
            found = self._layouts[widths] = begins, blocks, most
        return found

    def _meet(self) -> None:
        refuse_unless_all_can(self.group.group, None)


def _aligned(width: int) -> int:
    return -(-width // ops.ALIGNMENT) * ops.ALIGNMENT


def _tag(*what: object) -> int:
    """What must be the same on all ranks, as a number for a flag."""
    return zlib.crc32(repr(what).encode()) % (1 << ops.TAG_BITS)
