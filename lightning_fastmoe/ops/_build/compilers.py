"""Runs compilers as child processes that never outlive the build that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from lightning_fastmoe.errors import KernelsUnavailableError

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""

_SLICE = 0.1
"""Seconds after which the main thread checks for signals."""


class Compilers:
    """Runs compilers, several at once; use it as a context manager.

    Each gets its own process group, since nvcc does its work in child processes. However the block
    ends, including by an error, Ctrl-C or :func:`unwound_by_signals`, groups that are still running
    are killed and the compilers' temporary files are removed.

    Args:
        jobs: how many run at once.
    """

    def __init__(self, jobs: int) -> None:
        self._pool = ThreadPoolExecutor(jobs)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._closed = False

    def __enter__(self) -> Compilers:
        self._temporary = tempfile.TemporaryDirectory(prefix="lightning_fastmoe-")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._closed = True
            left = list(self._running)
        for process in left:
            end_group(process)
        self._pool.shutdown(cancel_futures=True)
        self._temporary.cleanup()

    def run(self, commands: Sequence[list[str]]) -> None:
        """Runs all commands to completion.

        Raises:
            KernelsUnavailableError: if one fails, with the end of its output.
        """
        pending = {self._pool.submit(self._run, command) for command in commands}
        # In slices: a signal that arrives just before the main thread starts waiting, or in another
        # thread, doesn't wake it, and Python runs handlers only in the main thread.
        while pending:
            done, pending = wait(pending, _SLICE, FIRST_EXCEPTION)
            for future in done:
                future.result()

    def _run(self, command: list[str]) -> None:
        with self._lock:
            if self._closed:
                return
            process = subprocess.Popen(  # noqa: S603 - the compiler, without a shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,
                env={**os.environ, "TMPDIR": self._temporary.name},
            )
            self._running.add(process)
        try:
            out, err = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        check_status(command, process.returncode, out + err)


def check_status(command: list[str], status: int, said: str) -> None:
    """Raises:
    KernelsUnavailableError: if a command failed, with the end of its output.
    """
    if status != 0:
        tail = "\n".join(said.strip().splitlines()[-20:])
        raise KernelsUnavailableError(f"this failed: {' '.join(command)}\n{tail}")


def end_group(process: subprocess.Popen[str]) -> None:
    """Terminates the process group that this process leads, then kills what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        # Its pipes are read by the thread that started it; this only waits.
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


class _Stopped(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP unwind the block before they end this process.

    Does nothing outside the main thread, or for signals that already have a handler.
    """
    ours: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        both = (signal.SIGTERM, signal.SIGHUP)
        ours = [number for number in both if signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # don't interrupt the unwinding
        raise _Stopped(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped as stopped:
        signal.signal(stopped.number, signal.SIG_DFL)
        os.kill(os.getpid(), stopped.number)
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
