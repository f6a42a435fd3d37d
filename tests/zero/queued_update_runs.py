"""What the ranks run in test_queued_update.py."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.midway_runs import EPOCHS, Run, WithDropout, fit
from strategy.models import Case, Net
from strategy.nonfinite_runs import Bad
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor

from lightning_fastmoe.errors import NonFiniteError, ParameterGroupError
from lightning_fastmoe.strategy.watchdog import signals
from lightning_fastmoe.zero.optimizer_step import ZeroOptimizer
from lightning_fastmoe.zero.verdict import PendingVerdict, Verdict


def order_of_calls(case: Case) -> list[str]:
    """In which order a run queues updates and reads whether to take them."""
    calls: list[str] = []

    def noted(owner: type, name: str) -> Any:
        original = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            calls.append(name)
            return original(self, *args)

        return mock.patch.object(owner, name, call)

    pl.seed_everything(7, verbose=False)
    with noted(PendingVerdict, "read"), noted(ZeroOptimizer, "_update_all"):
        make_trainer(case).fit(Bad(case, None, 0, None))
    return calls


def state_after_refusal(case: Case) -> tuple[str, int, list[float]]:
    """(error, entries of the optimizer's state, its step numbers) after a bad batch."""
    pl.seed_everything(7, verbose=False)
    trainer = make_trainer(case, max_steps=-1, max_epochs=1)
    error = ""
    try:
        trainer.fit(Bad(case, case.steps - 1, 0, None))
    except NonFiniteError as found:
        error = str(found)
    state = trainer.strategy.deepspeed_engine.optimizer.optimizer.state
    return error, len(state), [float(one["step"]) for one in state.values()]


def interrupted(
    case: Case, step: int, times: int, later: bool, folder: str
) -> tuple[int, int, Run, Run]:
    """Ctrl-C while the host waits to read whether to take a step.

    Args:
        case: the run.
        step: in which it comes.
        times: how often.
        later: whether the second one counts as if it came later.
        folder: for checkpoints.

    Returns:
        Steps that the Trainer has counted and the engine has taken; the run without Ctrl-C, and
        what comes of resuming.
    """
    straight = fit(case, 0.3, 7, {})
    read, reads = PendingVerdict.read, 0

    def signalled(self: PendingVerdict) -> Verdict:
        nonlocal reads
        reads += 1
        if reads == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return read(self)

    pl.seed_everything(7, verbose=False)
    keep = ModelCheckpoint(folder, save_last=True, save_on_exception=True, every_n_epochs=100)
    trainer = make_trainer(
        case, max_epochs=EPOCHS, max_steps=-1, callbacks=[keep], enable_checkpointing=True
    )
    before = signal.getsignal(signal.SIGINT)
    with (
        mock.patch.object(PendingVerdict, "read", signalled),
        mock.patch.object(signals, "SAME_REQUEST", -1.0 if later else 2.0),
        contextlib.suppress(KeyboardInterrupt, SystemExit),
    ):
        trainer.fit(WithDropout(case, 0.3))
    assert signal.getsignal(signal.SIGINT) == before
    counts = trainer.global_step, trainer.strategy.deepspeed_engine.global_steps
    last = str(Path(folder) / "last.ckpt")
    return *counts, straight, fit(case, 0.3, 9, {}, last)


class WithOptions(Net):
    """Sets an option of the optimizer's first group before each batch.

    Args:
        case: its sizes.
        option: its name.
        values: before each batch in turn; "as a tensor" makes one of what there is.
        rank: the only rank that sets it; None for all.
    """

    def __init__(self, case: Case, option: str, values: list[Any], rank: int | None) -> None:
        super().__init__(case)
        self.option, self.values, self.rank = option, values, rank

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.rank in (None, self.trainer.global_rank):
            group = self.trainer.optimizers[0].param_groups[0]
            value = self.values[batch_idx % len(self.values)]
            if value == "as a tensor":
                value = torch.as_tensor(group[self.option]).clone()
            group[self.option] = value


def with_options(
    case: Case, option: str, values: list[Any], rank: int | None = None
) -> tuple[str, dict[str, Tensor]]:
    """The error that ends it, and the weights on rank 0."""
    pl.seed_everything(7, verbose=False)
    module = WithOptions(case, option, values, rank)
    try:
        make_trainer(case).fit(module)
    except ParameterGroupError as error:
        return str(error), {}
    return "", whole_weights(module.net)
