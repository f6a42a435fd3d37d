"""A watchdog process for each rank that ends it if it hangs or ignores SIGTERM.

It is a separate process because nothing inside the rank is sure to run. A main thread that waits in
C code, in a launch or a collective, runs no Python signal handlers; if it holds the GIL while it
waits, no other Python thread runs either. This process needs only two things from the rank: shared
memory, where the rank records when it last made progress, and a socket, to which Python's C-level
signal handler writes the number of every signal that arrives.

When time is up, the sentry prints why to stderr and asks a thread of the rank to print stacks and
exit (see ``watch.py``). If that thread does not answer, a signal makes faulthandler print the
stacks from C, and SIGKILL ends the rank.

Run as a script that imports only the standard library, so that it starts in milliseconds.
"""

from __future__ import annotations

import enum
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from mmap import mmap

HANG_STATUS = 75
"""The exit status of a rank that hung (EX_TEMPFAIL: try again)."""
TERMINATED_STATUS = 128 + signal.SIGTERM
INTERRUPTED_STATUS = 128 + signal.SIGINT
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", signal.NSIG) - 5  # Linux only
"""Makes a rank print its stacks. torch, CUDA and NCCL don't use real-time signals."""
STOP = b"\0"
"""Sent by the rank when it no longer needs the sentry; not a valid signal number."""

PROGRESS = struct.Struct("<dqqB")
"""Time of the last progress (``time.monotonic``), optimizer steps, batches, activity."""
SPOKEN_AT, OVER_AT, EXCHANGE_AT, MEMORY_BYTES = 64, 65, 128, 4096

SAME_REQUEST = 2.0
"""Seconds within which signals count as one: the process group's, and torchrun's copy of it."""
_ANSWER = 3.0
_CREDENTIALS = struct.Struct("3i")
_MOVED_BYTES = 1 << 20


class Activity(enum.IntEnum):
    """What a rank is doing."""

    SETTING_UP = 0
    LOADING = 1
    TRAINING = 2
    VALIDATING = 3
    TESTING = 4
    PREDICTING = 5
    SAVING = 6
    ENDING = 7


WORDS = {
    Activity.SETTING_UP: "setting up",
    Activity.LOADING: "loading a checkpoint",
    Activity.TRAINING: "training",
    Activity.VALIDATING: "validating",
    Activity.TESTING: "testing",
    Activity.PREDICTING: "predicting",
    Activity.SAVING: "saving a checkpoint",
    Activity.ENDING: "ending the run",
}
_MOVES_BYTES = (Activity.SETTING_UP, Activity.LOADING, Activity.SAVING)
"""Long activities without batches, where bytes that the rank reads or writes are progress."""
_MAY_FINISH = (Activity.LOADING, Activity.SAVING, Activity.ENDING)
"""Activities that may finish after SIGTERM: a last checkpoint takes longer than a batch."""


def start_time(pid: int) -> str:
    """Start time of a process in ticks; with the pid it identifies the process uniquely."""
    return _stat(pid)[19]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat, starting with the third, the state."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _moved_bytes(pid: int) -> int:
    """Bytes that a process has read and written, caches included; 0 where unavailable."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            fields = dict(line.split(": ") for line in file)
        return sum(int(fields[name]) for name in ("rchar", "wchar", "read_bytes"))
    except (OSError, KeyError, ValueError):
        return 0


class Sentry:
    """Watches one rank.

    Args:
        rank: the rank, for messages.
        pid: the process id of the rank, the parent of this process.
        hang_timeout: seconds without progress; 0 means no limit.
        grace: seconds without progress after SIGTERM; 0 means no limit.
        linger: seconds between the message and the exit, in which other ranks print theirs.
        memory: the memory shared with the rank.
        exchange: layout of the record of exchanges.
        launched: (pid, start time) of the ranks that this rank has launched.
    """

    def __init__(
        self,
        rank: int,
        pid: int,
        hang_timeout: float,
        grace: float,
        linger: float,
        memory: mmap,
        exchange: struct.Struct,
        launched: Sequence[tuple[int, str]],
    ) -> None:
        self.rank, self.pid, self.linger = rank, pid, linger
        self.hang_timeout, self.grace = hang_timeout, grace
        self.memory, self.exchange, self.launched = memory, exchange, launched
        self.requests: dict[int, float] = {}  # signal -> when it first arrived
        self.again: int | None = None
        self._floor = self._looked = time.monotonic()
        self._moved = _moved_bytes(pid)
        limits = [limit for limit in (hang_timeout, grace) if limit]
        self._interval = max(0.05, min([1.0, *(limit / 10 for limit in limits)]))

    def run(self, channel: socket.socket) -> None:
        """Watches until the rank sends STOP or exits; then ends the processes that it launched."""
        while os.getppid() == self.pid:
            if select.select([channel], [], [], self._interval)[0]:
                numbers = self._receive(channel)
                if STOP in numbers:
                    return
                if not numbers:  # closed: the rank is gone, or will be in a moment
                    break
            verdict = self._verdict(time.monotonic())
            if verdict is not None:
                status, reason, linger = verdict
                if not self._end(status, reason, linger):
                    return
                self._end_launched(0.0)
                return
        self._end_launched(10.0)

    def _receive(self, channel: socket.socket) -> set[bytes]:
        """The signals that arrived, and STOP; empty if the connection is closed."""
        data, ancillary, *_ = channel.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
        if not data:
            return set()
        # Ignore processes forked from the rank, which inherit the socket and Python's handlers.
        sender = next((_CREDENTIALS.unpack(item[2])[0] for item in ancillary), self.pid)
        if sender != self.pid:
            return {b"\xff"}
        now = time.monotonic()
        for number in data:
            if number in (signal.SIGTERM, signal.SIGINT):
                first = self.requests.setdefault(number, now)
                if number == signal.SIGINT and PROGRESS.unpack_from(self.memory)[0] > first:
                    # The first KeyboardInterrupt was caught, and the run continues.
                    first = self.requests[number] = now
                if now - first > SAME_REQUEST:
                    self.again = number
                elif first == now and number == signal.SIGTERM:
                    self._send_launched(signal.SIGTERM)
        return {bytes([number]) for number in data}

    def _verdict(self, now: float) -> tuple[int, str, float] | None:
        """(exit status, why, seconds to linger) if the rank must end."""
        if self.again is not None:
            name = signal.Signals(self.again).name
            return 128 + self.again, f"{name} arrived a second time.", 0.0
        beat, *_, activity = PROGRESS.unpack_from(self.memory)
        if now - self._looked > self._interval + 2:
            self._floor = now  # this process was stopped for a while, and so was the rank
        self._looked = now
        if activity in _MOVES_BYTES:
            moved = _moved_bytes(self.pid)
            if moved - self._moved > _MOVED_BYTES:
                self._moved, self._floor = moved, now
        since = max(beat, self._floor)
        asked = self.requests.get(signal.SIGTERM)
        quiet = now - max(asked, since) if asked is not None else 0.0
        obeys = not self.grace or activity in _MAY_FINISH or quiet <= self.grace
        if asked is not None and not obeys and not self._is_stopped(now):
            return (
                TERMINATED_STATUS,
                f"SIGTERM arrived {now - asked:.0f} s ago, and no batch has finished in the last"
                f" {quiet:.0f} s (signal_grace={self.grace:g}).",
                self.linger,
            )
        if self.hang_timeout and now - since > self.hang_timeout and not self._is_stopped(now):
            return (
                HANG_STATUS,
                f"The run hangs: no batch has finished and nothing else has made progress for"
                f" {now - since:.0f} s (hang_timeout={self.hang_timeout:g}).",
                self.linger,
            )
        return None

    def _is_stopped(self, now: float) -> bool:
        """Whether the rank is stopped, or traced by a debugger."""
        stopped = _stat(self.pid)[0] in "Tt"
        if stopped:
            self._floor = now
        return stopped

    def _end(self, status: int, reason: str, linger: float) -> bool:
        """Ends the rank; returns False if its run is over already."""
        self._say(self._report(status, reason))
        with suppress(OSError):
            os.write(1, f"{status} {linger}\n".encode())
        begin = time.monotonic()
        signalled = False
        while os.getppid() == self.pid:
            time.sleep(0.02)
            if self.memory[OVER_AT]:
                return False
            waited = time.monotonic() - begin
            if not (self.memory[SPOKEN_AT] or signalled) and waited > min(_ANSWER, 1 + linger):
                signalled = True
                self._say(f"{self._name}: no Python thread answers: the GIL is held.\n")
                os.kill(self.pid, DUMP_SIGNAL)
            if waited > _ANSWER + linger + 2:
                self._say(f"{self._name}: ended by SIGKILL.\n")
                os.kill(self.pid, signal.SIGKILL)
                while os.getppid() == self.pid:
                    time.sleep(0.02)
        return True

    def _report(self, status: int, reason: str) -> str:
        now = time.monotonic()
        _, step, batches, activity = PROGRESS.unpack_from(self.memory)
        number, begun, pending, name = self.exchange.unpack_from(self.memory, EXCHANGE_AT)
        where = name.rstrip(b"\0").decode(errors="replace")
        if pending:
            tokens = f"waits in number {number}: {where}, for {now - begun:.1f} s"
        elif number:
            tokens = f"none is pending; the last was number {number}: {where}"
        else:
            tokens = "none yet"
        return (
            f"\n{self._name}: {reason}\n"
            f"  doing: {WORDS[Activity(activity)]}; optimizer steps done: {step}; batches of this"
            f" run: {batches}\n"
            f"  exchanges of tokens: {tokens}\n"
            f"  The stacks of all threads follow; then this process ends with status {status}.\n"
        )

    @property
    def _name(self) -> str:
        return f"lightning_fastmoe, rank {self.rank}"

    @staticmethod
    def _say(text: str) -> None:
        # Not into a full pipe that nobody reads: the rank may hang for the same reason.
        if select.select([], [2], [], 1.0)[1]:
            with suppress(OSError):
                os.write(2, text.encode())  # in one write: the ranks share the terminal

    def _send_launched(self, number: int) -> None:
        for process in filter(_lives, self.launched):
            with suppress(ProcessLookupError):
                os.kill(process[0], number)

    def _end_launched(self, seconds: float) -> None:
        """Gives the launched ranks some seconds to exit, then kills them."""
        deadline = time.monotonic() + seconds
        while self.launched and time.monotonic() < deadline:
            time.sleep(0.2)
            if not any(map(_lives, self.launched)):
                return
        self._send_launched(signal.SIGKILL)


def _lives(process: tuple[int, str]) -> bool:
    try:
        return start_time(process[0]) == process[1] and _stat(process[0])[0] != "Z"
    except OSError:
        return False


def arguments(
    rank: int,
    limits: tuple[float | None, float | None],
    linger: float,
    memory: int,
    exchange: struct.Struct,
    launched: Sequence[int],
) -> list[str]:
    """The command-line arguments that run this file as the sentry of the calling process."""
    own = [rank, os.getpid(), *(limit or 0.0 for limit in limits), linger, memory, exchange.format]
    processes = []
    for pid in launched:
        with suppress(FileNotFoundError):  # it has exited already
            processes.append(f"{pid}:{start_time(pid)}")
    return [__file__, *map(str, own), *processes]


def main() -> None:
    """Watches the parent process."""
    rank, pid, hang_timeout, grace, linger, memory, exchange, *launched = sys.argv[1:]
    pairs = [process.split(":") for process in launched]
    sentry = Sentry(
        int(rank),
        int(pid),
        float(hang_timeout),
        float(grace),
        float(linger),
        mmap(int(memory), MEMORY_BYTES),
        struct.Struct(exchange),
        [(int(p), started) for p, started in pairs],
    )
    sentry.run(socket.socket(fileno=0))


if __name__ == "__main__":
    main()
