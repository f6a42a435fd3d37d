"""When each step of a training run ended, without waiting for the device in between."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule


class Clock:
    """Steps' ends and losses.

    Attributes:
        losses: of each step.
    """

    def __init__(self) -> None:
        self._marks: list[Any] = []
        self._on_gpu = torch.cuda.is_available()
        self.losses: list[Tensor] = []

    def start(self) -> None:
        """Just before the first step."""
        self._mark()

    def step(self, loss: Tensor) -> None:
        """At the end of each step."""
        self._mark()
        self.losses.append(loss)

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """How long each step took."""
        if self._on_gpu:
            torch.cuda.synchronize()
            pairs = zip(self._marks, self._marks[1:], strict=False)
            return [first.elapsed_time(second) for first, second in pairs]
        return [
            1000 * (second - first)
            for first, second in zip(self._marks, self._marks[1:], strict=False)
        ]

    def report(self, warm_up: int, steps: int) -> dict[str, Any]:
        """The median of steps ``warm_up`` to ``steps``, its quartiles, and losses."""
        timed = self.milliseconds()[warm_up:steps]
        first, median, third = statistics.quantiles(timed, n=4)
        return {
            "ms": round(median, 2),
            "quartiles_ms": [round(first, 2), round(third, 2)],
            "first_loss": float(self.losses[0]),
            "last_loss": statistics.median(map(float, self.losses[:steps][-LAST_STEPS:])),
        }


LAST_STEPS = 8
"""Steps whose median loss is the last loss: one alone may be a spike."""

PROFILED = 3
"""Steps that a profile takes after those that are timed: two to settle, and the one that counts."""


class Profiling(Clock):
    """Also records the kernels of the last of :data:`PROFILED` steps after ``steps`` timed ones."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self._profiler: Any = None

    def step(self, loss: Tensor) -> None:
        """At the end of each step."""
        super().step(loss)
        done = len(self.losses) - self._steps
        if done == PROFILED - 2:
            torch.cuda.synchronize()
            warmed = schedule(wait=0, warmup=1, active=1, repeat=1)
            self._profiler = profile(activities=[ProfilerActivity.CUDA], schedule=warmed)
            self._profiler.start()
        elif done > PROFILED - 2:
            torch.cuda.synchronize()
            self._profiler.step()

    def kernels(self) -> list[tuple[str, float, float]]:
        """(name, start, end) of each kernel, in microseconds."""
        return [
            (event.name, float(event.time_range.start), float(event.time_range.end))
            for event in self._profiler.events()
            if event.device_type == DeviceType.CUDA
        ]
