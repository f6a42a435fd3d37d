"""Ends a rank that hangs or ignores SIGTERM: the rank's side of ``sentry.py``."""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from lightning_fastmoe.distributed import EXCHANGE, PendingExchange
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.strategy.watchdog.sentry import (
    DUMP_SIGNAL,
    EXCHANGE_AT,
    MEMORY_BYTES,
    OVER_AT,
    PROGRESS,
    SPOKEN_AT,
    STOP,
    TERMINATED_STATUS,
    WORDS,
    Activity,
    arguments,
)

__all__ = ["TERMINATED_STATUS", "Activity", "Watch", "check_seconds"]

_LINGER = 2.0
_LINGER_OF_LAUNCHED = 7.0
"""Longer, so that rank 0 ends first: Lightning kills the run once a launched rank is gone."""
_STDERR = 2
_ON_LINUX = sys.platform.startswith("linux")


def check_seconds(name: str, value: Any) -> None:
    """Checks an argument of FastMoEStrategy that is a time limit.

    Raises:
        ConfigError: if it is neither None nor a positive, finite number.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value) and value > 0):
        raise ConfigError(
            f"FastMoEStrategy({name}={value!r}) is invalid: it must be a positive, finite number of"
            " seconds, or None for no limit."
        )


class Watch:
    """Reports this rank's progress to the sentry, and prints stacks when the sentry asks.

    The cost per batch is one write of 25 bytes to shared memory.

    A thread prints the stacks, as a main thread that is blocked in C code can't raise an exception.
    The thread runs wherever C code has released the GIL, as torch's collectives and
    synchronisations do. Where it can't run, the sentry's signal prints the stacks, since
    faulthandler's handler needs no GIL, and the sentry kills the rank.

    Args:
        hang_timeout: seconds without progress after which the run ends; None means no limit.
        grace: seconds without progress after SIGTERM; None means no limit.
    """

    def __init__(self, hang_timeout: float | None, grace: float | None) -> None:
        self._limits = (hang_timeout, grace)
        self._memory: Any = bytearray(MEMORY_BYTES)
        self._process: subprocess.Popen[bytes] | None = None
        self._step = self._batches = 0
        self._activity = Activity.SETTING_UP

    # ---------------------------------------------------------------------------------- progress

    def beat(self, activity: Activity | None = None, step: int | None = None) -> None:
        """Records progress.

        Args:
            activity: the activity that begins now; None keeps the current one.
            step: optimizer steps done, if known.
        """
        if activity is not None:
            self._activity = activity
        if step is not None:
            self._step = step
        PROGRESS.pack_into(
            self._memory, 0, time.monotonic(), self._step, self._batches, self._activity
        )

    def batch(self, activity: Activity, step: int | None = None) -> None:
        """Records that the forward pass of a batch is done."""
        self._batches += 1
        self.beat(activity, step)

    def doing(self) -> str:
        """A short description of what this rank is doing."""
        return f"{WORDS[self._activity]}, optimizer steps done: {self._step}"

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Records an activity for the duration of the context."""
        before = self._activity
        self.beat(activity)
        try:
            yield
        finally:
            self.beat(before)

    # ------------------------------------------------------------------------------ start and stop

    def start(
        self,
        rank: int,
        device: torch.device,
        launched: Sequence[int] = (),
        is_launched: bool = False,
    ) -> None:
        """Starts the sentry; on Linux only, as it reads /proc.

        Args:
            rank: this process's rank in the world.
            device: the device of this rank.
            launched: process ids of the ranks that this one has launched. They end with it.
            is_launched: whether this process is such a launched rank.

        Raises:
            ConfigError: if the process can't be started.
        """
        if self._process is not None or self._limits == (None, None) or not _ON_LINUX:
            return
        self._device = device
        linger = _LINGER_OF_LAUNCHED if is_launched else _LINGER
        descriptor = os.memfd_create("lightning_fastmoe_watch")
        own, theirs = socket.socketpair()
        try:
            os.ftruncate(descriptor, MEMORY_BYTES)
            self._memory = mmap.mmap(descriptor, MEMORY_BYTES)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            script = arguments(rank, self._limits, linger, descriptor, EXCHANGE, launched)
            # Signals sent to the whole process group are not for the sentry.
            before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            try:
                self._process = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-I", "-S", *script],
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=_STDERR,
                    pass_fds=[descriptor],
                    bufsize=0,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except OSError as error:
            own.close()
            raise ConfigError(
                f"The process that watches rank {rank} can't be started ({error}). It needs the"
                f" interpreter, {sys.executable!r}, and room for one more process; or do without"
                " it: FastMoEStrategy(hang_timeout=None, signal_grace=None)."
            ) from error
        finally:
            theirs.close()
            os.close(descriptor)
        self._channel = own
        self.beat()
        faulthandler.register(DUMP_SIGNAL, file=_STDERR, all_threads=True, chain=False)
        self._fit_thread = threading.get_ident()
        self._previous_wakeup: int | None = None
        if threading.current_thread() is threading.main_thread():
            own.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(own.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="fastmoe-watch", daemon=True)
        self._stopping = False
        self._thread.start()

    def exchanges(self) -> PendingExchange:
        """A record of exchanges that the sentry can read."""
        return PendingExchange(self._memory, EXCHANGE_AT)

    def stop(self) -> None:
        """Stops the sentry and the thread, and frees their resources; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        self._stopping = True
        if self._previous_wakeup is not None:
            current = signal.set_wakeup_fd(self._previous_wakeup)
            if current != self._channel.fileno():
                signal.set_wakeup_fd(current)  # somebody else has replaced it
        with suppress(OSError):
            self._channel.send(STOP)
        self._channel.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._thread.join()
        assert process.stdout is not None
        process.stdout.close()
        faulthandler.unregister(DUMP_SIGNAL)
        memory, self._memory = self._memory, bytearray(MEMORY_BYTES)
        memory.close()

    # ------------------------------------------------------------------------------------ the end

    def _listen(self) -> None:
        process, memory = self._process, self._memory
        assert process is not None
        assert process.stdout is not None
        words = os.read(process.stdout.fileno(), 100).split()
        if not words:
            if not self._stopping:
                _say(
                    "lightning_fastmoe: the sentry is gone; a hang will no longer end the"
                    " process.\n"
                )
            return
        if not self._is_in_fit():
            # An error skipped the teardown, and the user's program caught it.
            memory[OVER_AT] = 1
            _say(
                "lightning_fastmoe: but no run is in progress any more, so the process is not"
                " ended.\n"
            )
            return
        status, linger = int(words[0]), float(words[1])
        begin = time.monotonic()
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        memory[SPOKEN_AT] = 1
        # These may block on locks that the main thread holds.
        last = threading.Thread(target=_last_words, args=(self._device,), daemon=True)
        last.start()
        last.join(max(1.0, linger))
        # Gives the other ranks time to report: the launcher may end them all when this one exits.
        time.sleep(max(0.0, begin + linger - time.monotonic()))
        # Not an exception: the main thread may never get to raise it.
        os._exit(status)

    def _is_in_fit(self) -> bool:
        frame = sys._current_frames().get(self._fit_thread)
        while frame is not None:
            if frame.f_code.co_name == "_call_and_handle_interrupt":
                return True
            frame = frame.f_back
        return False


def _last_words(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_initialized():
        # The allocator's own numbers: nothing here waits for the device.
        allocated, reserved = (
            read(device) / 2**30
            for read in (torch.cuda.memory_allocated, torch.cuda.memory_reserved)
        )
        _say(f"  {device}: {allocated:.2f} GiB allocated, {reserved:.2f} GiB reserved\n")
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(_STDERR, text.encode())
