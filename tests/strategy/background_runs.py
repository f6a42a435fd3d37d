"""What the ranks run where a save in the background is compared with one that is waited for."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from strategy.midway_runs import Run, Watch, fit_watched
from strategy.models import Case

from lightning_fastmoe.checkpoint import background
from lightning_fastmoe.checkpoint.save import Snapshot


def interrupted_waits() -> list[str]:
    """What happens, in order, where Ctrl-C comes while a save is waited for, and then again."""
    events: list[str] = []
    dist.init_process_group("gloo")

    def write(*args: Any) -> None:
        assert go_on.wait(60)
        events.append("written")

    with mock.patch.object(background, "write", write):
        writer = background.BackgroundWriter()
        for wait in (writer.wait, lambda: writer.submit(Path("second"), Snapshot([]))):
            go_on = threading.Event()
            writer.submit(Path("first"), Snapshot([]))
            writer.after_success(lambda: events.append("the older one is deleted"))
            timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
            timer.start()
            try:
                wait()
            except KeyboardInterrupt:
                events.append("interrupted")
            writer.poll()
            events.append("still pending" if writer.is_pending(Path("first")) else "over")
            timer = threading.Timer(0.5, go_on.set)
            timer.start()
            writer.wait()
            timer.join()
    return events


STEPS_AHEAD = 2
"""Optimizer steps that are taken before the thread may read what it writes."""


class Gate(Watch):
    """Keeps the writing thread waiting until training is some optimizer steps ahead of it."""

    def __init__(self, saves: dict[int, str]) -> None:
        super().__init__(saves)
        self.open = threading.Event()
        self.until = 0
        self.ahead: list[int] = []
        self.pinned: set[bool] = set()

    def write(self, path: Path, *args: Any) -> None:
        """In the thread, instead of the writer's function."""
        assert self.open.wait(60), "training never got so far ahead"
        WRITE(path, *args)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.batches + 1 in self.saves:
            self.open.clear()
            self.until = trainer.global_step + STEPS_AHEAD
        super().on_train_batch_end(trainer, pl_module, *args)
        saved = [path for n, path in self.saves.items() if n <= self.batches]
        if saved and not self.open.is_set() and trainer.global_step >= self.until:
            assert not Path(saved[-1]).exists()
            self.ahead.append(trainer.global_step)
            memory = trainer.strategy._saving._made_writer._copies._memory
            self.pinned |= {values.is_pinned() for values in memory.values()}
            self.open.set()


WRITE = background.write


@dataclass
class Pair:
    """The same training with saves of both kinds."""

    waited: Run
    went_on: Run
    ahead: list[int]
    pinned: set[bool]


def both_kinds(case: Case, waited: dict[int, str], went_on: dict[int, str]) -> Pair:
    """Trains twice; saves after so many batches, and waits for it or goes on."""
    gate = Gate(went_on)
    first = fit_watched(case, 0.3, 7, Watch(waited), None)
    case = replace(case, extra={**case.extra, "async_checkpoint": True})
    with mock.patch.object(background, "write", gate.write):
        second = fit_watched(case, 0.3, 7, gate, None)
    return Pair(first, second, gate.ahead, gate.pinned)
