"""When each step of a training run ended, without waiting for the device in between."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor


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

    def report(self, warm_up: int) -> dict[str, Any]:
        """The median step after ``warm_up`` steps, its quartiles, and losses."""
        steps = self.milliseconds()[warm_up:]
        first, median, third = statistics.quantiles(steps, n=4)
        return {
            "ms": round(median, 2),
            "quartiles_ms": [round(first, 2), round(third, 2)],
            "first_loss": float(self.losses[0]),
            "last_loss": float(self.losses[-1]),
        }
