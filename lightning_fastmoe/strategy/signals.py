"""Handles stop signals between batches, on all ranks at the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from typing_extensions import override

from lightning_fastmoe.strategy.watch import Activity, Watch


class DeferredSignals(pl.Callback):
    """Defers Lightning's handlers of SIGTERM and of SLURM's requeue signal.

    Lightning's handlers talk to the other ranks at once, wherever each of them is: between two
    exchanges of tokens on one rank, two later on another. The ranks then wait for each other until
    they are killed, or a checkpoint of half a step is saved. Here a signal is only noted; after
    each batch the ranks begin to tell each other, and after the next, if one has got a signal, all
    run the handlers. (A single rank runs them at once.) If no batch ends any more, the watch ends
    the process.

    Made by the strategy on all ranks together when training starts.

    Args:
        trainer: whose handlers to put off.
        watch: told that SIGTERM is being obeyed.
    """

    def __init__(self, trainer: pl.Trainer, watch: Watch) -> None:
        self._trainer, self._watch = trainer, watch
        self._callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._callbacks.append(self)
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: set[int] = set()
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._under_way: tuple[Any, torch.Tensor] | None = None
        if threading.current_thread() is not threading.main_thread():
            return  # where Python lets nobody set handlers, Lightning has none
        environment = trainer._accelerator_connector.cluster_environment
        numbers = [signal.SIGTERM]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            numbers.append(environment.requeue_signal or signal.SIGUSR1)
        for number in numbers:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def detach(self) -> None:
        """Removes itself from the Trainer, which restores the handlers."""
        if self in self._callbacks:
            self._callbacks.remove(self)
        if self._group is not None and self._under_way is None:
            # Else an error came in between, and the other ranks may never answer.
            dist.destroy_process_group(self._group)
            self._group = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.add(number)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._obey_what_all_know()
        # Alike on all ranks, whose environment is the same.
        noted = torch.tensor([number in self._noted for number in self._handlers], dtype=torch.int)
        if self._group is None:
            self._obey(noted)
        else:
            # Over by the end of the next batch, so that nobody waits for it.
            work = dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._under_way = (work, noted)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._obey_what_all_know()

    def _obey_what_all_know(self) -> None:
        """Takes the ranks' answers of the batch before."""
        if self._under_way is not None:
            work, noted = self._under_way
            self._under_way = None
            work.wait()
            self._obey(noted)

    def _obey(self, noted: torch.Tensor) -> None:
        for number, is_noted in zip(list(self._handlers), noted.tolist(), strict=True):
            if is_noted:
                handler = self._handlers.pop(number)
                if number == signal.SIGTERM:
                    self._watch.beat(Activity.ENDING)
                    # Lightning would send it on to the ranks that it has launched. They know
                    # already, and to their own watch it would be the second, which ends them.
                    self._trainer._signal_connector.received_sigterm = True
                handler(number, None)
