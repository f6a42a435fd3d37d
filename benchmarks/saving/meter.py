"""Times and memory of all ranks, and files out of the page cache."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def files_below(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def to_disk(path: Path, *, forget: bool = False) -> None:
    """Waits until files are on the disk, and takes them out of the page cache if told to."""
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        if forget:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def begin_anew() -> int:
    """From now on VmHWM is the peak of what comes; returns what is resident at the moment."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is needed
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


class Meter:
    """Times of the slowest rank, and the largest rise of memory.

    Attributes:
        cpu: seconds of all ranks' processors in the last measurement.
    """

    cpu = 0.0

    def measure(self, action: Callable[[], Any], after: Callable[[], Any] | None = None) -> Any:
        before = begin_anew()
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        action()
        times = [time.perf_counter() - start]
        cpu = time.process_time() - cpu
        peak = resident("VmHWM") - before
        dist.barrier()
        if after is not None:
            after()
            times.append(time.perf_counter() - start)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (times, peak, cpu))
        slowest = [max(own[i] for own, *_ in everybody) for i in range(len(times))]
        self.cpu = sum(cpu for *_, cpu in everybody)
        return slowest, max(peak for _, peak, _ in everybody)
