"""What a device draws, and how fast its clock runs, while it is kept busy.

A GPU under load slows its clock down until it stays below its power limit. Work that takes seconds
is then limited by its energy: whatever saves none does not make it faster. So operations are run
without a pause, long enough for the clock to settle, and the driver is asked meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import IO

import torch

from layer.errors import BenchmarkError

QUERY = "timestamp,power.draw.instant,clocks.sm"
SAMPLE_MS = 20
QUEUE_MS = 30.0
"""So much work is queued at a time, that the device never waits for the host."""


@dataclass(frozen=True)
class Sample:
    """One answer of the driver.

    Attributes:
        at: time of the sample, by this machine's clock.
        watts: power draw.
        mhz: clock of the multiprocessors.
    """

    at: datetime
    watts: float
    mhz: float


def parse(line: str) -> Sample | None:
    """Parses a line of nvidia-smi; None if it is not a sample."""
    try:
        at, watts, mhz = (part.strip() for part in line.split(","))
        when = datetime.strptime(at, "%Y/%m/%d %H:%M:%S.%f")  # noqa: DTZ007 - local, like now()
        return Sample(when, float(watts), float(mhz))
    except ValueError:
        return None


class Meter:
    """Asks nvidia-smi about one device, as a context manager.

    Args:
        device: a CUDA device.
        command: instead of nvidia-smi's, for tests.
    """

    def __init__(self, device: torch.device, command: list[str] | None = None) -> None:
        self.samples: list[Sample] = []
        self.command = command or [
            "nvidia-smi",
            f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}",
            f"--query-gpu={QUERY}",
            "--format=csv,noheader,nounits",
            f"--loop-ms={SAMPLE_MS}",
        ]

    def __enter__(self) -> Meter:
        try:
            # In a group of its own, with which all ends that could hold the pipe open.
            self.process = subprocess.Popen(  # noqa: S603
                self.command, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        except OSError as error:
            raise BenchmarkError(f"{self.command[0]} can't be run: {error}") from error
        self.thread = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self.thread.start()
        return self

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                if (sample := parse(line)) is not None:
                    self.samples.append(sample)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(10)
        self.thread.join(10)  # it reads what is left in the pipe

    def between(self, start: datetime, end: datetime) -> tuple[float, float]:
        """Mean watts and MHz.

        Raises:
            BenchmarkError: if there are no samples.
        """
        inside = [s for s in self.samples if start <= s.at <= end]
        if not inside:
            raise BenchmarkError("nvidia-smi told no power; it takes a Hopper GPU or a newer one.")
        return (
            sum(s.watts for s in inside) / len(inside),
            sum(s.mhz for s in inside) / len(inside),
        )


@dataclass(frozen=True)
class Sustained:
    """An operation, run without a pause.

    Attributes:
        ms: time of one run.
        watts: mean power draw meanwhile.
        mhz: mean clock meanwhile.
    """

    ms: float
    watts: float
    mhz: float

    @property
    def joules(self) -> float:
        """Energy of one run."""
        return self.watts * self.ms / 1e3


def keep_busy(run: Callable[[], object], queue: int, seconds: float) -> tuple[int, float]:
    """Runs for ``seconds``, at most two queues of ``queue`` runs at a time; runs and seconds."""
    begin = time.perf_counter()
    done, earlier = 0, None
    while time.perf_counter() - begin < seconds:
        for _ in range(queue):
            run()
        done += queue
        event = torch.cuda.Event()
        event.record()
        if earlier is not None:
            earlier.synchronize()
        earlier = event
    torch.cuda.synchronize()
    return done, time.perf_counter() - begin


def sustained(run: Callable[[], object], device: torch.device, seconds: float) -> Sustained:
    """Runs an operation for half of ``seconds``, and then measures for ``seconds``.

    Raises:
        BenchmarkError: if the driver tells no power.
    """
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    queue = max(1, round(QUEUE_MS / ((time.perf_counter() - begin) * 1e3 / 3)))
    with Meter(device) as meter:
        keep_busy(run, queue, seconds / 2)
        start = datetime.now()  # noqa: DTZ005 - local, like the driver's
        done, took = keep_busy(run, queue, seconds)
        end = datetime.now()  # noqa: DTZ005
    watts, mhz = meter.between(start, end)
    return Sustained(took * 1e3 / done, watts, mhz)


def idle_watts(device: torch.device, seconds: float) -> float:
    """What the device draws while a process holds it and nothing runs.

    Raises:
        BenchmarkError: if the driver tells no power.
    """
    torch.cuda.synchronize()
    with Meter(device) as meter:
        time.sleep(seconds / 2)
        start = datetime.now()  # noqa: DTZ005
        time.sleep(seconds / 2)
        end = datetime.now()  # noqa: DTZ005
    return meter.between(start, end)[0]
