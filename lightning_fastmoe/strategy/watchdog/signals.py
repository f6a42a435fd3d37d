"""Handles stop signals between batches, on all ranks at the same one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_fastmoe.strategy.watchdog.sentry import SAME_REQUEST
from lightning_fastmoe.strategy.watchdog.validations import Validations
from lightning_fastmoe.strategy.watchdog.watch import Activity, Watch

_BROADCAST = "_broadcast_sigterm_tensor"
"""Lightning's method that asks rank 0 before each batch."""
_END_OF_EPOCH = "on_advance_end"
"""The method of Lightning's loop over epochs that ends one."""
_END_OF_BATCH = "on_advance_end"
"""That of its loop over batches, which validates where it is due."""
_LATER = b"\nCtrl-C: training ends after this batch. Another one two seconds later: at once.\n"
_LAST = 0
"""Told with the signals: the validation that is under way is not to be left."""


class DeferredSignals(pl.Callback):
    """Defers Lightning's handlers of SIGTERM and of SLURM's requeue signal.

    Lightning's handlers communicate immediately, wherever each rank is: one rank may be two token
    exchanges ahead of another. The ranks then deadlock, or save a checkpoint in the middle of a
    step. Here a signal is only recorded. After each batch the ranks start an asynchronous
    all-reduce of what they recorded, and after the next batch, if any rank got a signal, all run
    the handlers. (A single rank runs them right after the batch.) A validation that would follow
    does not begin, and SIGTERM ends one between its batches unless it ends the epoch. At the end of
    each epoch, after its validation and the callbacks that save, they wait for each other, since no
    further batch may follow. If neither comes, the watch ends the process.

    SIGINT (Ctrl-C) in a batch is deferred, too: what is saved in the middle of one has half of its
    gradients, or weights of a step that isn't counted. So it is on several ranks wherever they are
    before the last batch: one may wait for its next while another is in it. It ends the run where
    SIGTERM does, after all hooks of the batch. Another one two seconds later acts at once, as the
    first does on a single rank between batches and in validations.

    Created by the strategy on all ranks together when training starts.

    Args:
        trainer: the Trainer with the handlers to defer.
        watch: notified when SIGTERM is handled.
        wait: waits for a collective, and raises if another rank gave up; takes it and what it is.
    """

    def __init__(self, trainer: pl.Trainer, watch: Watch, wait: Callable[[Any, str], None]) -> None:
        self._trainer, self._watch, self._wait = trainer, watch, wait
        self._callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._callbacks.append(self)
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: set[int] = set()
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._under_way: tuple[Any, torch.Tensor] | None = None  # without work on a single rank
        # Before each batch Lightning broadcasts whether rank 0 got SIGTERM, and the host waits for
        # the device to find out. Here all ranks know it already, at the same batch.
        self._loop = trainer.fit_loop
        self._validations = Validations(trainer)
        self._loop.epoch_loop.__dict__[_BROADCAST] = _do_nothing
        self._loop.__dict__[_END_OF_EPOCH] = self._end_epoch
        # The same on all ranks, with or without a handler here.
        self._numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        self._interrupt: Callable[[int, FrameType | None], Any] = signal.default_int_handler
        self._in_batch, self._interrupted = False, 0.0
        self._interrupts = False  # SIGINT's handler is to run when the batch is over
        self._is_over = False
        self._loop.epoch_loop.__dict__[_END_OF_BATCH] = self._end_batch
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows no handlers here, so Lightning has none either
        environment = trainer._accelerator_connector.cluster_environment
        connector = trainer._signal_connector
        if connector.received_sigterm:
            # Before the training. The other ranks may not know, and Lightning would end this alone.
            self._noted.add(signal.SIGTERM)
            connector.received_sigterm = False
        handled = [signal.SIGTERM]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._numbers[1] = environment.requeue_signal or signal.SIGUSR1
            handled = self._numbers[:2]
        for number in handled:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt):
            self._interrupt = interrupt
            signal.signal(signal.SIGINT, self._note_interrupt)

    def detach(self) -> None:
        """Removes itself from the Trainer, which restores the handlers."""
        if self in self._callbacks:
            self._callbacks.remove(self)
        self._loop.epoch_loop.__dict__.pop(_BROADCAST, None)
        self._loop.epoch_loop.__dict__.pop(_END_OF_BATCH, None)
        self._loop.__dict__.pop(_END_OF_EPOCH, None)
        self._validations.detach()
        if signal.getsignal(signal.SIGINT) == self._note_interrupt:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._group is not None and self._under_way is None:
            # Otherwise an error came in between, and the other ranks may never join the all-reduce.
            dist.destroy_process_group(self._group)
            self._group = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.add(number)

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # After an error in an error's handling, this is still here, and nothing ends any more.
        is_running = self._trainer.state.status == TrainerStatus.RUNNING
        if number in self._noted or self._interrupts:
            if now - self._interrupted > SAME_REQUEST:  # launchers send it once more
                self._interrupt(number, frame)
        elif is_running and (self._in_batch or (self._group is not None and not self._is_over)):
            self._noted.add(number)
            self._interrupted = now
            if self._trainer.is_global_zero:
                with suppress(OSError):  # tee, say, which has got the signal as well
                    os.write(2, _LATER)  # not print(), which the signal may have come in
        else:
            self._interrupt(number, frame)

    @override
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._in_batch = True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._in_batch = False
        self._obey(self._known())
        if trainer.received_sigterm:
            return  # no batch follows, in which all could learn more
        self._tell()  # done by the end of the next batch, so no rank waits for it
        if self._group is None:
            self._obey(self._known())

    @override
    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begins none: Lightning leaves it after a batch, but not on a rank that has only one."""
        self._in_batch = False  # a batch that a hook skips has no end
        if self._interrupts and self._validations.can_be_left:
            self._validations.leave()
            self._interrupt_now()
        if trainer.received_sigterm:
            if self._validations.can_be_left:
                self._validations.leave()
            raise SIGTERMException

    def after_validation_step(self) -> None:
        """Leaves a validation of a training after SIGTERM; all ranks take as many steps of it.

        Raises:
            SIGTERMException: on all ranks after the same step.
        """
        self._leave_validation(self._known())
        self._tell()
        if self._group is None:
            self._leave_validation(self._known())

    def _leave_validation(self, known: list[int]) -> None:
        if _LAST in known:
            return
        if signal.SIGINT in known:
            self._validations.leave()
            self._obey([signal.SIGINT])
            self._interrupt_now()
        if signal.SIGTERM in known:
            self._validations.leave()
            self._obey(known)  # a checkpoint for SLURM as well, now that it says what is to be done
            raise SIGTERMException

    def _end_batch(self, fetcher: Any) -> None:
        """Ends the batch as Lightning does: the run ends here, unless the epoch does."""
        batches = self._loop.epoch_loop
        type(batches).on_advance_end(batches, fetcher)
        if not batches.done:
            self._interrupt_now()

    def _end_epoch(self) -> None:
        """Ends the epoch as Lightning does, which then looks whether SIGTERM has come."""
        self._in_batch = False
        type(self._loop).on_advance_end(self._loop)
        self._obey(self._known())
        self._tell()
        self._obey(self._known())
        self._is_over = self._was_last_epoch()
        self._interrupt_now()
        if self._trainer.received_sigterm:
            raise SIGTERMException

    def _was_last_epoch(self) -> bool:
        """What Lightning's ``done`` says, without the message that it logs each time."""
        loop = self._loop
        progress: Any = loop.epoch_progress.current
        ends = (
            (progress.processed, loop.max_epochs),
            (loop.epoch_loop.global_step, loop.max_steps),
        )
        reached = any(end not in (None, -1) and count >= end for count, end in ends)
        return reached or self._trainer.should_stop

    def _interrupt_now(self) -> None:
        """Runs SIGINT's handler, which need not raise, if it is due."""
        if self._interrupts:
            self._interrupts = False
            self._interrupt(signal.SIGINT, None)

    def _tell(self) -> None:
        """Tells all ranks which signals this one has recorded."""
        noted = {*self._noted, *([] if self._validations.can_be_left else [_LAST])}
        flags = torch.tensor([n in noted for n in (*self._numbers, _LAST)], dtype=torch.int)
        work = None
        if self._group is not None:
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._under_way = (work, flags)

    def _known(self) -> list[int]:
        """What any rank had recorded when all told of it; nothing if that was asked before."""
        if self._under_way is None:
            return []
        work, flags = self._under_way
        self._under_way = None
        if work is not None:
            self._wait(work, "the exchange of which signals have come")
        numbers = (*self._numbers, _LAST)
        return [n for n, is_noted in zip(numbers, flags.tolist(), strict=True) if is_noted]

    def _obey(self, known: list[int]) -> None:
        """Runs the handlers of signals; that of SIGINT once the batch is over."""
        for number in known:
            if number == signal.SIGINT:  # of whatever rank
                self._interrupts = True
                self._noted.discard(number)
            elif number in self._handlers:
                handler = self._handlers.pop(number)
                if number == signal.SIGTERM:
                    self._watch.beat(Activity.ENDING)
                    # Keeps Lightning from forwarding it to the ranks that it launched. They know
                    # already, and a second SIGTERM would make their watch end them.
                    self._trainer._signal_connector.received_sigterm = True
                handler(number, None)


def _do_nothing() -> None:
    pass
