"""Several files at once: one core hashes less than many disks take, and a file is hashed in order.

hashlib, reads, writes and copies all release the interpreter's lock, so threads are enough.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

MAX_THREADS = 8
"""More would need more memory, and at 1 GB/s for each the disk is what one waits for."""

OnBytes = Callable[[int], None]
T = TypeVar("T")


class _Stopped(Exception):
    """Another job has failed; nobody waits for this one."""


def thread_count(ranks_on_host: int) -> int:
    """How many files a rank works on at a time.

    That is its share of the cores that this process may use, but at least two: while one file
    waits for the disk, the other is hashed.

    Args:
        ranks_on_host: how many ranks do the same on this machine.
    """
    return max(2, min(MAX_THREADS, len(os.sched_getaffinity(0)) // ranks_on_host))


def run_all(
    jobs: Sequence[Callable[[OnBytes], T]],
    threads: int,
    on_bytes: OnBytes | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[T]:
    """Runs jobs in threads. The first error ends the others as soon as they report.

    Args:
        jobs: begun in this order. Each calls its argument with the number of bytes that it has
            dealt with, often enough to be stopped there.
        threads: how many run at a time; with one, in the calling thread.
        on_bytes: called with every report, by one thread at a time.
        prepare: called once in each thread.

    Returns:
        What the jobs returned, in their order.

    Raises:
        BaseException: what the first job to fail has raised, after all have ended.
    """
    stop, lock = threading.Event(), threading.Lock()

    def report(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        if on_bytes is not None:
            with lock:
                on_bytes(count)

    threads = min(threads, len(jobs))
    if threads <= 1:
        return [job(report) for job in jobs]
    with ThreadPoolExecutor(
        threads, thread_name_prefix="checkpoint-files", initializer=prepare
    ) as pool:
        futures = [pool.submit(job, report) for job in jobs]
        left = set(futures)
        try:
            while left:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:  # an error or an interrupt: what has not begun never does
            stop.set()
            for future in left:
                future.cancel()
        return [future.result() for future in futures]
