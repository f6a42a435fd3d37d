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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.distributed.dispatch import ExpertGroup
from lightning_fastmoe.distributed.dispatch.counts import HEADER, pack_counts, unpack_counts
from lightning_fastmoe.distributed.symmetric.flags import Flags
from lightning_fastmoe.distributed.symmetric.memory import (
    SymmetricMemory,
    check_reachable,
    refuse_unless_all_can,
)
from lightning_fastmoe.ops import exchange as ops

MAX_SLOTS = 4096
"""Most numbers that the ranks' counts may have."""
_COUNTS_BYTES = 8 * (MAX_SLOTS + HEADER)
_GRANULE = 1 << 16
_HALVES = 2


@dataclass(frozen=True)
class Part:
    """Rows that are sent together with others.

    Attributes:
        rows: (n, w), contiguous.
        order: (N,) int64, the rows to send by rank, each times ``divisor``; None sends ``rows``.
        divisor: see ``order``.
    """

    rows: Tensor
    order: Tensor | None = None
    divisor: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.rows.shape[1] * self.rows.element_size()


@dataclass(frozen=True)
class Arrival:
    """What has arrived in this rank's memory; others will write to it in exchanges to come.

    Attributes:
        memory: this rank's.
        ranks: R.
        most: rows of a rank that there is room for.
        widths: bytes of a row of each part.
        at: the byte at which each part begins: ``most`` rows of each rank.
    """

    memory: Tensor
    ranks: int
    most: int
    widths: Sequence[int]
    at: Sequence[int]

    def copy(self, part: int, counts: Sequence[int]) -> Tensor:
        """(sum(counts), w) uint8, by rank: a copy.

        Args:
            part: which part.
            counts: rows from each rank.
        """
        width, begin = self.widths[part], self.at[part]
        word = torch.int64 if width % 8 == 0 else torch.uint8
        blocks = []
        for count in counts:
            blocks.append(self.memory[begin : begin + count * width].view(word))
            begin += self.most * _aligned(width)
        return torch.cat(blocks).view(torch.uint8).view(sum(counts), width)

    def in_place(self, part: int) -> Tensor:
        """(R * most, w) uint8, a view, of which only what ranks sent has values.

        The ranks' rows must have a common distance: :meth:`SymmetricExchange.has_common_distance`.
        """
        width, begin, rows = self.widths[part], self.at[part], self.ranks * self.most
        return self.memory[begin : begin + rows * width].view(rows, width)

    def padded(self, part: int, counts: Sequence[int]) -> Tensor:
        """(R * max(counts), w) uint8, a copy, of which only what ranks sent has values.

        Args:
            part: which part.
            counts: rows from each rank.
        """
        rows = self.copy(part, counts)
        blocks = rows.new_zeros(self.ranks, max(counts), rows.shape[1])
        for block, own in zip(blocks, rows.split(list(counts)), strict=True):
            block[: len(own)] = own
        return blocks.flatten(0, 1)

    def block_bytes(self, part: int) -> int:
        """Bytes from one rank's rows of a part to the next one's."""
        return self.most * _aligned(self.widths[part])


@dataclass
class _Kind:
    """One kind of exchange, and the latest.

    Attributes:
        first_line: where its flags are, a line for each half.
        number: how many exchanges there have been.
        tag: what the latest is about.
        is_read: recorded when the latest has been read, on a GPU.
    """

    first_line: int
    number: int = 0
    tag: int = 0
    is_read: torch.cuda.Event | None = None

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
        # One row for each rank: the counts go to all.
        self._aside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._to_all = torch.arange(group.size, device=device)
        self._ends = torch.arange(1, group.size + 1, device=device, dtype=torch.int32)
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

    def exchange_counts(self, counts: Tensor, width: int, layer: str) -> Tensor | None:
        """:meth:`ExpertGroup.exchange_counts`; None if there is no room for the model's counts."""
        if self.group.slots > MAX_SLOTS:  # the same on all ranks
            return None
        here = counts.to(self.device, non_blocking=True)
        self.send_counts(here, width, layer)
        return self.read_counts(len(here), layer)

    def send_counts(self, counts: Tensor, width: int, layer: str) -> int:
        """Sends this rank's counts to all; :meth:`read_counts` must follow.

        ``counts`` must live until then: they are sent by another stream than the current one.

        Args:
            counts: (n,) int64.
            width: D, which must be the same on all ranks.
            layer: the layer's name.

        Returns:
            The number of this exchange, the same on all ranks.
        """
        if self._aside is not None:
            self._aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._aside):  # so that they pass the rows
            kind = self._begin(self._counts, layer, "counts", tag=0)
            vector = pack_counts(counts, self._slots, kind.number, width, layer)
            ops.push_rows(
                *(vector.unsqueeze(0), self._to_all, self._ends, self.group.size),
                *(self._control.ranks, self.group.rank, self._counts_at(self.group.rank), 1),
            )
            self._flags.set(kind.line, kind.value)
        return kind.number

    def read_counts(self, count: int, layer: str) -> Tensor:
        """Waits for the counts of all ranks.

        Args:
            count: n.
            layer: the layer's name.

        Returns:
            (R, n) int64, on the CPU.

        Raises:
            ExchangeError: as :meth:`ExpertGroup.exchange_counts`.
        """
        kind, ranks = self._counts, self.group.size
        begin = self._counts_at(0)
        table = self._control.own[begin : begin + ranks * _COUNTS_BYTES].view(torch.int64)
        table = table.view(ranks, -1)[:, : HEADER + self._slots]
        with self.group.pending(layer, "counts"), torch.cuda.stream(self._aside):
            where = self.group.where(layer, "counts")
            found = self._flags.wait_and_read(kind.line, kind.value, table, where)
            self._end(kind)
        return unpack_counts(found, count, layer)

    def needs(self, most: int, widths: Sequence[int]) -> int:
        """Bytes for ``most`` rows of each of these numbers of bytes."""
        return max(most, 1) * sum(map(_aligned, widths))

    def most(self, widths: Sequence[int]) -> int:
        """Rows of a rank that there is room for, if they have these numbers of bytes."""
        return self._layout(widths)[0]

    @staticmethod
    def has_common_distance(width: int) -> bool:
        """Whether rows of so many bytes, of all ranks, are at multiples of one distance."""
        return width == _aligned(width)

    def send(self, parts: Sequence[Part], ends: Tensor, layer: str, phase: str, call: int) -> None:
        """Pushes rows to their ranks; :meth:`arrival` must follow, unless a rank had to skip it.

        Args:
            parts: all with the same numbers of rows, which must fit into :attr:`capacity`.
            ends: (R,) int32, where the rows for each rank end.
            layer: the layer's name.
            phase: what is exchanged.
            call: the same number on all ranks; ranks with different ones end in an error, as do
                those with rows of different lengths.
        """
        assert self.rows is not None
        widths = [part.row_bytes for part in parts]
        kind = self._begin(self._rows, layer, phase, _tag(layer, phase, call, widths))
        most, at = self._layout(widths)
        for part, begin in zip(parts, at, strict=True):
            begin += self.group.rank * most * _aligned(part.row_bytes)
            ops.push_rows(
                *(part.rows, part.order, ends, part.divisor, self.rows.ranks),
                *(self.group.rank, begin, most),
            )
        self._flags.set(kind.line, kind.value)

    @contextmanager
    def arrival(self, widths: Sequence[int], layer: str, phase: str) -> Iterator[Arrival]:
        """Waits for the rows of all ranks, which may be read until the end of the context.

        Args:
            widths: bytes of a row of each part, as sent.
            layer: the layer's name.
            phase: what is exchanged.
        """
        assert self.rows is not None
        kind = self._rows
        with self.group.pending(layer, phase):
            self._flags.wait(kind.line, kind.value, self.group.where(layer, phase))
        most, at = self._layout(widths)
        yield Arrival(self.rows.own, self.group.size, most, widths, at)
        self._end(kind)

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

    def skip_rows(self) -> None:
        """In place of :meth:`send`, on a rank whose rows don't fit. None may receive then."""
        self._rows.number += 1

    @property
    def _slots(self) -> int:
        return min(self.group.slots, MAX_SLOTS)

    def _begin(self, kind: _Kind, layer: str, phase: str, tag: int) -> _Kind:
        with self.group.pending(layer, phase):
            self.group.wait.begin(self.group.where(layer, phase))
        self._flags.check()
        if kind.is_read is not None:  # the user may have changed the stream
            kind.is_read.wait()
        kind.number += 1
        kind.tag = tag
        return kind

    def _end(self, kind: _Kind) -> None:
        if self.device.type == "cuda":
            if kind.is_read is None:
                kind.is_read = torch.cuda.Event()
            kind.is_read.record()

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
