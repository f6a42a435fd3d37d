"""The flags of a group in symmetric memory, and waits for them with a deadline and a reason."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fastmoe.distributed.dispatch import ExpertGroup
from lightning_fastmoe.distributed.dispatch.counts import MISMATCH
from lightning_fastmoe.distributed.symmetric.memory import SymmetricMemory
from lightning_fastmoe.errors import ExchangeError
from lightning_fastmoe.ops import exchange as ops
from lightning_fastmoe.ops import exchange_counts as counts

_LATER = {"host": 1.03, "rows": 1.05}
"""Deadlines of other waits, times that of the device's wait for counts, which ends first: its
report names the missing ranks, and it stops no device."""
_REMEMBERED = 64


@dataclass(frozen=True)
class Table:
    """Where all ranks write vectors in a rank's memory.

    Attributes:
        place: the byte at which the first rank's begins, and bytes from one to the next.
        columns: int64 of each that are read.
        stream: waits for them on a GPU; None on the CPU.
    """

    place: tuple[int, int]
    columns: int
    stream: torch.cuda.Stream | None


class Flags:
    """Flags of all ranks, in lines: line l of a rank has a flag of each rank.

    In the first, a rank that gives up tells the others, and whoever waits for anything then gives
    up too.

    Args:
        group: the expert parallel group.
        memory: the memory that they are at the beginning of; zeros.

    Attributes:
        is_on_device: whether a GPU waits for them, not the host.
        report: (4,) int64, pinned: what a wait of the device that failed says, see
            :func:`~lightning_fastmoe.ops.exchange.wait_for_flags`.
    """

    def __init__(self, group: ExpertGroup, memory: SymmetricMemory) -> None:
        self._group, self._memory = group, memory
        self._names: OrderedDict[int, str] = OrderedDict()
        self.is_on_device = memory.own.is_cuda
        self.report = torch.zeros(4, dtype=torch.int64, pin_memory=self.is_on_device)
        self._reported = self.report.numpy()  # quicker to look at
        self._found: Tensor | None = None
        self._abandoned: Tensor | None = None
        self._is_interrupted = False  # by something else than the deadline or other ranks
        self._event: torch.cuda.Event | None = None

    @staticmethod
    def bytes_of(lines: int, ranks: int) -> int:
        """Bytes of memory that this many lines take."""
        return (1 + lines) * ranks * ops.FLAG_BYTES

    def at(self, line: int) -> int:
        """The byte at which a line begins."""
        return (1 + line) * self._group.size * ops.FLAG_BYTES

    def wait(self, at: int, value: int, where: str, *, fatal: bool = True) -> None:
        """Waits for all ranks: the host on the CPU, the current stream on a GPU.

        Args:
            at: the byte at which the flags begin.
            value: what to wait for.
            where: for errors.
            fatal: whether the device traps if they don't come, because what the stream runs then
                would read what never came. On the CPU the host raises.
        """
        self.awaited(value, where)
        if not self.is_on_device:
            self._wait_on_host(at, value, where)
            return
        memory, rank = self._memory.ranks, self._group.rank
        ops.wait_for_flags(memory, rank, at, value, self.report, self.seconds, fatal)

    def awaited(self, value: int, where: str) -> None:
        """Notes what a wait that is launched otherwise waits for.

        Args:
            value: of the flags.
            where: for errors.
        """
        self.check()
        self._remember(value, where)

    def start_reading(
        self, line: int, value: int, table: Table, where: str, *, is_launched: bool = False
    ) -> None:
        """On a GPU, waits on ``table.stream`` for all ranks, and copies the table to the host.

        Args:
            line: of the flags.
            value: what to wait for.
            table: where the others write.
            where: for errors.
            is_launched: whether that is already on its way, to :meth:`on_host`.
        """
        self.awaited(value, where)
        if table.stream is None:
            return
        if not is_launched:
            counts.await_table(
                *(self._memory.ranks, self._group.rank, self.at(line), value, *table.place),
                *(self.on_host(table.columns), self.report, self.reading_seconds),
                table.stream.cuda_stream,
            )
        if self._event is None:
            self._event = torch.cuda.Event()
        self._event.record(table.stream)

    def follow_reading(self) -> None:
        """Makes the current stream wait for what :meth:`start_reading` has started."""
        if self._event is not None:
            self._event.wait()

    def finish_reading(self, line: int, value: int, table: Table, where: str) -> NDArray[np.int64]:
        """What all ranks have written to ``table``, on the host.

        Raises:
            ExchangeError: if the others don't come before the deadline, naming them.
        """
        if table.stream is None:
            self._wait_on_host(self.at(line), value, where)
            found = counts.table(self._memory.own, *table.place, self._group.size, table.columns)
            return found.numpy().copy()
        try:
            limit = self._limit(_LATER["host"]) or None
            self._group.wait.for_event(self._event, where, seconds=limit)
        except BaseException as error:
            on_host, self._found = self._found, None  # the kernel may still write to it
            self._abandoned = on_host
            self.give_up()
            if not isinstance(error, ExchangeError):
                self.check()  # a wait in an earlier exchange may be why the device has stopped
            raise
        self.check()
        return self.on_host(table.columns).numpy().copy()

    def check(self) -> None:
        """Raises:
        ExchangeError: if an earlier wait has failed.
        """
        missing, different, given_up, value = self._reported.tolist()
        if missing:
            where = self._names.get(value, "an exchange of tokens")
            raise self._ended(where, missing, different, given_up)

    def _ended(self, where: str, missing: int, different: int, given_up: int) -> ExchangeError:
        reason = _reason(missing, different, given_up)
        told = bool(given_up and not different)
        late = not (different or given_up or self._is_interrupted)
        return ExchangeError(self._group.wait.ended(where, reason, late=late, told=told))

    def _remember(self, value: int, where: str) -> None:
        self._names[value] = where
        if len(self._names) > _REMEMBERED:
            self._names.popitem(last=False)

    @property
    def seconds(self) -> float:
        """How long the device waits for rows; 0 for no limit."""
        return self._limit(_LATER["rows"])

    @property
    def reading_seconds(self) -> float:
        """How long the device waits for counts, for which the host waits, too; 0 for no limit."""
        return self._limit(1.0)

    def _limit(self, factor: float) -> float:
        """Seconds of a wait: the deadline times a factor; 0 for none."""
        seconds = self._group.wait.seconds
        return 0.0 if seconds is None else max(1e-3, factor * seconds)

    def on_host(self, columns: int) -> Tensor:
        """(R, columns) int64, pinned, which the next exchange overwrites."""
        if self._found is None or self._found.shape[1] != columns:
            self._found = torch.empty(self._group.size, columns, dtype=torch.int64, pin_memory=True)
        return self._found

    def _wait_on_host(self, at: int, value: int, where: str) -> None:
        own, ranks = self._memory.own, self._group.size
        flags = ops.flags_of(own, at, ranks)
        arrival = _Arrival(flags, ops.flags_of(own, ops.GIVEN_UP_AT, ranks), value)
        try:
            self._group.wait.for_event(arrival, where)
        except BaseException as error:
            missing, different, given_up = self._stop(arrival, value)
            self._is_interrupted = not isinstance(error, ExchangeError)
            if not (self._is_interrupted or different or given_up):
                raise ExchangeError(f"{error} {_reason(missing, 0, 0)}") from error  # the deadline
            raise
        if arrival.is_hopeless:
            raise self._ended(where, *self._stop(arrival, value))
        ops.fence()

    def _stop(self, arrival: _Arrival, value: int) -> tuple[int, int, int]:
        """Gives up a wait of the host, and reports it as a device would; what it has seen."""
        missing, different, given_up = arrival.look()
        self.report.copy_(torch.tensor([missing or 1, different, given_up, value]))
        self.give_up()
        return missing, different, given_up

    def give_up(self) -> None:
        """Tells all ranks that this one has given up, so that none waits for it."""
        if not self.is_on_device:
            ops.set_flags(self._memory.ranks, self._group.rank, ops.GIVEN_UP_AT, 1)
            return
        with (
            suppress(RuntimeError),  # the device may be unusable
            torch.cuda.stream(torch.cuda.Stream(self._memory.own.device)),  # others may stand still
        ):
            ops.set_flags(self._memory.ranks, self._group.rank, ops.GIVEN_UP_AT, 1)


class _Arrival:
    """Looks like a CUDA event.

    Attributes:
        is_hopeless: whether some flags will never be there.
    """

    def __init__(self, flags: Tensor, given_up: Tensor, value: int) -> None:
        self._flags, self._given_up, self._value = flags, given_up, value
        self.is_hopeless = False

    def look(self) -> tuple[int, int, int]:
        """Bits of the ranks that are missing, in another exchange, and have given up."""
        given_up = sum(1 << rank for rank, flag in enumerate(self._given_up.tolist()) if flag)
        return *ops.compare_flags(self._flags, self._value), given_up

    def query(self) -> bool:
        """Whether all flags are there, or never will be."""
        missing, different, given_up = self.look()
        self.is_hopeless = bool(missing and (different or given_up))
        return self.is_hopeless or not missing


def _reason(missing: int, different: int, given_up: int) -> str:
    if different:
        ranks = _ranks(different)
        return f"In another exchange: {ranks} of the expert parallel group. {MISMATCH}"
    if given_up:
        return f"Given up: {_ranks(given_up)} of the expert parallel group."
    return f"Missing: {_ranks(missing)} of the expert parallel group."


def _ranks(bits: int) -> str:
    ranks = [str(rank) for rank in range(ops.MAX_RANKS) if bits >> rank & 1]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
