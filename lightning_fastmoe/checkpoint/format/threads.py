"""Runs jobs on several files in parallel, because hashing on one core is slower than many disks.

hashlib, reads, writes and copies all release the GIL, so threads are enough.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

MAX_THREADS = 8
"""Maximum number of threads: more would need more memory, and at 1 GB/s each the disk is slower."""

OnBytes = Callable[[int], None]
T = TypeVar("T")


class _Stopped(Exception):
    """Raised inside a job to stop it after another job has failed."""


def thread_count(ranks_on_host: int) -> int:
    """Number of files that a rank works on at a time.

    It is the rank's share of the cores that this process may use, but at least two, so that one
    file is hashed while the other waits for the disk.

    Args:
        ranks_on_host: number of ranks that work at the same time on this machine.
    """
    return max(2, min(MAX_THREADS, len(os.sched_getaffinity(0)) // ranks_on_host))


def run_all(
    jobs: Sequence[Callable[[OnBytes], T]],
    threads: int,
    on_bytes: OnBytes | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[T]:
    """Runs jobs in threads. After an error, the other jobs stop at their next report.

    Args:
        jobs: functions, started in this order. Each regularly calls its argument with the number of
            bytes that it has processed; this call is also where it can be stopped.
        threads: number of jobs that run at a time; 1 runs them in the calling thread.
        on_bytes: called with every report, by one thread at a time.
        prepare: called once in each thread.

    Returns:
        The jobs' results, in order.

    Raises:
        BaseException: the error of the first job to fail, after all have ended.
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
        finally:  # after an error or an interrupt, jobs that are still waiting never start
            stop.set()
            for future in left:
                future.cancel()
        return [future.result() for future in futures]
