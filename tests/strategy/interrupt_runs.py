"""What the ranks run in test_interrupts.py: one of them gets Ctrl-C, in or between batches."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.midway_runs import TOKENS
from strategy.models import D_IN, Case, Net, loss_of
from strategy.signal_runs import RANK, how_it_ends
from strategy.tracing import make_trainer
from torch import Tensor

from lightning_fastmoe.strategy.watchdog import signals

BATCHES, EPOCHS = 4, 2


class Loader:
    """Four batches an epoch, with a state: what a run that resumes begins with depends on it alone.

    Args:
        before: called with the number of a batch of the run before it is read.
    """

    def __init__(self, before: Any = lambda number: None) -> None:
        self.position, self.read, self.before = 0, 0, before

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        self.position %= BATCHES
        while self.position < BATCHES:
            generator = torch.Generator().manual_seed(self.position)
            self.before(self.read)
            self.position += 1
            self.read += 1
            yield torch.randn(2, TOKENS, D_IN, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Interrupted(Net):
    """Gets Ctrl-C in the middle of a batch of one rank, or while the rank waits for it.

    Args:
        case: its sizes.
        batch: the number of the batch; -1 for none.
        between: whether while it waits.
    """

    def __init__(self, case: Case, batch: int = -1, between: bool = False) -> None:
        pl.seed_everything(7, verbose=False)
        super().__init__(case)
        self.batch, self.between, self.count = batch, between, 0
        self.done: list[str] = []
        self.register_buffer("average", torch.zeros(()))

    def train_dataloader(self) -> Loader:
        return Loader(self._wait)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(2, 2, TOKENS, D_IN), batch_size=None)

    def _is_here(self, number: int) -> bool:
        return number == self.batch and dist.get_rank() == RANK % dist.get_world_size()

    def _wait(self, number: int) -> None:
        if self.between and self._is_here(number):
            time.sleep(0.5)  # the other rank is in the batch by now
            os.kill(os.getpid(), signal.SIGINT)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.done.append(f"{self.current_epoch}.{batch_idx}")
        if not self.between and self._is_here(self.count):
            os.kill(os.getpid(), signal.SIGINT)
        self.count += 1
        return loss_of(self.net, batch)

    def on_train_batch_end(self, *args: Any) -> None:
        """What a moving average or a counter does: no batch may miss it, or have it twice."""
        self.average += 1
        self.done.append("hook")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.done.append("validate")
        torch.rand(())  # as dropout may

    def on_train_epoch_end(self) -> None:
        self.done.append("end")


def fit(
    case: Case, module: Interrupted, interval: int | None, folder: str, path: str | None = None
) -> str:
    """What ends a training that validates each ``interval`` batches, or each epoch."""
    keep = ModelCheckpoint(folder, save_last=True, save_on_exception=True, every_n_epochs=100)
    trainer = make_trainer(
        case,
        max_epochs=EPOCHS,
        max_steps=-1,
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        val_check_interval=interval,
        callbacks=[keep],
        enable_checkpointing=True,
    )
    return how_it_ends(trainer, module, path)


Ended = tuple[int, str, list[str], list[str], float]


def in_every_batch(case: Case, interval: int | None, folder: str) -> tuple[list[str], list[Ended]]:
    """An uninterrupted run's order; and of one with Ctrl-C in each of its batches in turn:

    the batch, what ended it, the order of the run and of that which resumes it, and by how much its
    weights and buffers differ in the end.
    """
    straight = Interrupted(case)
    fit(case, straight, interval, folder)
    found = []
    for batch in range(BATCHES * EPOCHS):
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
            os.mkdir(folder)
        dist.barrier()
        ended = Interrupted(case, batch)
        how = fit(case, ended, interval, folder)
        rest = Interrupted(case)
        fit(case, rest, interval, folder, str(Path(folder) / "last.ckpt"))
        both = zip(straight.state_dict().values(), rest.state_dict().values(), strict=True)
        differs = max(float((a - b).abs().max()) for a, b in both)
        found.append((batch, how, ended.done, rest.done, differs))
    return straight.done, found


def while_a_rank_waits(case: Case, folder: str) -> tuple[str, list[str]]:
    """What ends it, and its order."""
    module = Interrupted(case, 2, between=True)
    return fit(case, module, None, folder), module.done


def with_a_handler_that_returns(case: Case, folder: str) -> tuple[str, int, int]:
    """What ends it, batches, and how often the program's own handler was called."""
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        module = Interrupted(case, 2)
        how = fit(case, module, None, folder)
    finally:
        signal.signal(signal.SIGINT, before)
    return how, module.count, len(calls)


def after_an_error_in_an_errors_handling(case: Case, folder: str) -> tuple[str, str]:
    """The error, after which Lightning tears nothing down; and what Ctrl-C does afterwards."""

    class Failing(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ValueError("first")

        def on_exception(self, *args: Any) -> None:
            raise ValueError("second")

    found = "nothing"
    trainer = make_trainer(case, max_steps=2, callbacks=[Failing()])
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(Interrupted(case))
    except ValueError as error:
        found = str(error)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        ends = "nothing"
    except KeyboardInterrupt:
        ends = "KeyboardInterrupt"
    trainer.strategy.teardown()
    assert signal.getsignal(signal.SIGINT) == before
    return found, ends


def without_a_screen(case: Case, folder: str) -> tuple[str, int]:
    """What ends it, and batches, where nothing can be said: ``| tee`` has got the signal, too."""
    module = Interrupted(case, 2)
    closed = SimpleNamespace(write=mock.Mock(side_effect=BrokenPipeError))
    with mock.patch.object(signals, "os", closed):
        how = fit(case, module, None, folder)
    return how, module.count
