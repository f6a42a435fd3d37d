"""What the ranks run in test_signals.py: one of them gets a signal in the middle of a batch."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from strategy.midway_runs import BATCHES, EPOCHS, TOKENS, Run, Watch, WithDropout, fit
from strategy.models import D_IN, Case
from strategy.resume_runs import error_of
from strategy.tracing import make_trainer
from torch import Tensor

from lightning_fastmoe.checkpoint.lockstep import meet_after_error
from lightning_fastmoe.strategy.checkpointing import saving

RANK = 1


class Signalled(WithDropout):
    """Rank 1 gets a signal when it has done half of a forward pass."""

    def __init__(self, case: Case, number: int, batch: int) -> None:
        super().__init__(case, 0.3)
        self.number, self.batch, self.batches = number, batch, 0
        self.net["norm"].register_forward_hook(self._kill)

    def _kill(self, *args: Any) -> None:
        if self.batches == self.batch and dist.get_rank() == RANK % dist.get_world_size():
            self.batch = -1
            os.kill(os.getpid(), self.number)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return super().training_step(batch, batch_idx)


def terminated(
    case: Case, batch: int, directory: str, number: int = signal.SIGTERM
) -> tuple[str, int, Run, Run]:
    """(what ended it, batches done, the run without a signal, what comes of resuming)."""
    straight = fit(case, 0.3, 7, {})
    pl.seed_everything(7, verbose=False)
    module = Signalled(case, number, batch)
    keep = ModelCheckpoint(directory, save_last=True, save_on_exception=True, every_n_epochs=100)
    trainer = make_trainer(
        case, max_epochs=EPOCHS, max_steps=-1, callbacks=[keep], enable_checkpointing=True
    )
    before, callbacks = signal.getsignal(number), len(trainer.callbacks)
    ended = how_it_ends(trainer, module)
    assert signal.getsignal(number) == before
    assert len(trainer.callbacks) == callbacks
    last = str(Path(directory) / "last.ckpt")
    return ended, len(module.batch_losses), straight, fit(case, 0.3, 9, {}, last)


def how_it_ends(trainer: pl.Trainer, module: pl.LightningModule, path: str | None = None) -> str:
    """The name of the exception that ends a training."""
    try:
        trainer.fit(module, ckpt_path=path)
    except SystemExit as error:
        return type(error).__name__
    return "nothing"


class SignalledOutsideOfBatches(Checkpoint):
    """Rank 1 gets SIGTERM before the first batch, or after the last one."""

    def __init__(self, when: str) -> None:
        self.when = when

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.when == "before the first batch" and self._is_here():
            # As Lightning's handler does, without its broadcast, which the others aren't in.
            trainer._signal_connector.received_sigterm = True

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Where it saves, after all other callbacks."""
        is_last = trainer.current_epoch == EPOCHS - 1
        if self.when == "after the last batch" and is_last and self._is_here():
            os.kill(os.getpid(), signal.SIGTERM)

    @staticmethod
    def _is_here() -> bool:
        return dist.get_rank() == RANK % dist.get_world_size()


def ended_by_sigterm(case: Case, when: str) -> tuple[str, int]:
    """(what ended it, batches done)."""
    pl.seed_everything(7, verbose=False)
    last = BATCHES * EPOCHS if when == "in the last batch" else -1
    module = Signalled(case, signal.SIGTERM, last)
    trainer = make_trainer(
        case,
        max_epochs=EPOCHS,
        max_steps=-1,
        callbacks=[SignalledOutsideOfBatches(when)],
        enable_checkpointing=True,
    )
    return how_it_ends(trainer, module), len(module.batch_losses)


class Unsized:
    """Three batches on rank 0 and one on rank 1, without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.zeros((3, 1)[dist.get_rank()], 2, TOKENS, D_IN)


class SignalledBeforeValidation(Signalled):
    """All ranks learn of the signal in the last batch before a validation."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, signal.SIGTERM, BATCHES - 1)

    def val_dataloader(self) -> Unsized:
        return Unsized()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net["moes"][0](self.net["embed"](batch))


def ended_before_validation(case: Case) -> tuple[str, int]:
    """(what ended it, batches done)."""
    module = SignalledBeforeValidation(case)
    trainer = make_trainer(case, max_epochs=EPOCHS, max_steps=-1, limit_val_batches=1.0)
    return how_it_ends(trainer, module), len(module.batch_losses)


VALIDATION = (4, 2)
"""Batches of rank 0 and of rank 1, which takes as many steps nonetheless."""


@dataclass
class Order:
    """What a run did on this rank: steps and saves in order, and the means that were validated."""

    steps: list[str] = field(default_factory=list)
    means: list[float] = field(default_factory=list)


class Validated(WithDropout):
    """Rank 1 gets signals in its validation steps.

    Args:
        case: its sizes.
        signals: by step, which counts from 1.
    """

    def __init__(self, case: Case, signals: dict[int, int] | None = None) -> None:
        super().__init__(case, 0.3)
        self.signals, self.order = signals or {}, Order()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.order.steps.append("train")
        return super().training_step(batch, batch_idx)

    def val_dataloader(self) -> Iterable[Tensor]:
        rank = dist.get_rank()
        generator = torch.Generator().manual_seed(rank)
        batches = torch.randn(VALIDATION[rank], 2, TOKENS, D_IN, generator=generator)
        # It draws a number from the global generator, whenever a validation begins.
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.order.steps.append("validate")
        value = self.net["moes"][0](self.net["embed"](batch)).square().mean()
        self.log("mean", value, batch_size=2, sync_dist=True)
        is_here = dist.get_rank() == RANK % dist.get_world_size()
        number = self.signals.get(self.order.steps.count("validate"))
        if number is not None and is_here:
            os.kill(os.getpid(), number)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.order.steps.append("save")

    def on_validation_epoch_end(self) -> None:
        self.order.means.append(float(self.trainer.callback_metrics["mean"]))


def fit_validated(
    module: Validated, interval: int | None, path: str | None = None, **options: Any
) -> tuple[str, Order]:
    """What ended it, and what it did; validates each ``interval`` batches, or each epoch."""
    trainer = make_trainer(
        module.case,
        max_epochs=EPOCHS,
        max_steps=-1,
        limit_val_batches=1.0,
        val_check_interval=interval,
        num_sanity_val_steps=0,
        **options,
    )
    return how_it_ends(trainer, module, path), module.order


def terminated_in_validation(
    case: Case, step: int, interval: int | None, saves: bool, directory: str
) -> tuple[Order, tuple[str, Order], Order, bool]:
    """A run, one that SIGTERM ends, what resumes; whether all weights have the same bits then.

    Args:
        case: its sizes.
        step: of validation in which the signal comes.
        interval: between validations.
        saves: whether checkpoints are saved after each step, too.
        directory: of checkpoints.
    """
    pl.seed_everything(7, verbose=False)
    whole = Validated(case)
    _, straight = fit_validated(whole, interval)
    pl.seed_everything(7, verbose=False)
    every = {"every_n_train_steps": 1} if saves else {"every_n_epochs": 100}
    keep = ModelCheckpoint(directory, save_last=True, save_on_exception=True, **every)
    options = {"callbacks": [keep], "enable_checkpointing": True}
    ended = fit_validated(Validated(case, {step: signal.SIGTERM}), interval, **options)
    pl.seed_everything(9, verbose=False)
    again = Validated(case)
    _, rest = fit_validated(again, interval, str(Path(directory) / "last.ckpt"))
    both = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    return straight, ended, rest, all(torch.equal(a, b) for a, b in both)


def broadcasts_of_batches(case: Case) -> list[int]:
    """How often single integers are broadcast in each batch of a training."""
    calls: list[str] = []
    counts: list[int] = []

    class Counting(pl.Callback):
        def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
            counts.append(len(calls))
            calls.clear()

    broadcast = dist.broadcast

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() == 1 and not tensor.is_floating_point():
            calls.append("one")
        return broadcast(tensor, *args, **kwargs)

    with mock.patch.object(dist, "broadcast", counted):
        trainer = make_trainer(case, max_steps=4, callbacks=[Counting()])
        trainer.fit(WithDropout(case, 0.0))
    assert "_broadcast_sigterm_tensor" not in vars(trainer.fit_loop.epoch_loop)
    return counts[1:]


class Slurm(SLURMEnvironment):
    """SLURM as far as signals go; ranks are those of the test's processes."""

    @staticmethod
    def detect() -> bool:
        return False

    creates_processes_externally = property(lambda self: True)
    main_address = property(lambda self: os.environ["MASTER_ADDR"])
    main_port = property(lambda self: int(os.environ["MASTER_PORT"]))

    def world_size(self) -> int:
        return int(os.environ["WORLD_SIZE"])

    def global_rank(self) -> int:
        return int(os.environ["RANK"])

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing is wrong."""


def requeued(case: Case, batch: int, directory: str) -> tuple[int, Run, Run]:
    """(batches done, the run without a signal, what comes of resuming from SLURM's save)."""
    straight = fit(case, 0.3, 7, {})
    pl.seed_everything(7, verbose=False)
    module, watch = Signalled(case, signal.SIGUSR1, batch), Watch({})
    trainer = make_trainer(
        case,
        max_epochs=EPOCHS,
        max_steps=-1,
        callbacks=[watch],
        plugins=[Slurm(auto_requeue=True)],
        default_root_dir=directory,
    )
    with mock.patch.dict(os.environ, SLURM_JOB_ID="1", PATH=directory):  # no scontrol there
        trainer.fit(module)
    path = str(Path(directory) / "hpc_ckpt_1.ckpt")
    return len(module.batch_losses), straight, fit(case, 0.3, 9, {}, path)


def requeued_in_validation(
    case: Case, signals: dict[int, int], directory: str
) -> tuple[list[str], list[str]]:
    """The steps of a run that gets SLURM's signal in a validation, and of one that resumes."""
    module, again = Validated(case, signals), Validated(case)
    options = {"plugins": [Slurm(auto_requeue=True)], "default_root_dir": directory}
    with mock.patch.dict(os.environ, SLURM_JOB_ID="1", PATH=directory):
        fit_validated(module, 3, **options)
    fit_validated(again, 3, str(Path(directory) / "hpc_ckpt_1.ckpt"))
    return module.order.steps, again.order.steps


class Failing(WithDropout):
    """Raises in the middle of a batch, on all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(self.batch_losses) == 4:
            raise ZeroDivisionError("a bug")
        return super().training_step(batch, batch_idx)


def saved_after_error(case: Case, directory: str) -> tuple[list[str], int, int]:
    """(warnings, losses of the failed run, losses of the run that resumes)."""
    module = Failing(case, 0.0)
    keep = ModelCheckpoint(directory, save_last=True, save_on_exception=True, every_n_epochs=100)
    trainer = make_trainer(
        case, max_epochs=EPOCHS, max_steps=-1, callbacks=[keep], enable_checkpointing=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(ZeroDivisionError):
            trainer.fit(module)
    rest = fit(case, 0.0, 9, {}, str(Path(directory) / "last.ckpt"))
    return [str(w.message) for w in caught], len(module.batch_losses), len(rest.losses)


class FailingAlone(Failing):
    """Raises on rank 1 alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_rank == 0:
            return WithDropout.training_step(self, batch, batch_idx)
        return super().training_step(batch, batch_idx)


def fails_alone(case: Case, directory: str) -> tuple[list[str], list[str]]:
    """The errors of this rank, the last one first, and what is in the directory."""
    module = FailingAlone(case, 0.0)
    keep = ModelCheckpoint(directory, save_last=True, save_on_exception=True, every_n_epochs=100)
    trainer = make_trainer(
        case, max_epochs=EPOCHS, max_steps=-1, callbacks=[keep], enable_checkpointing=True
    )
    meet = functools.partial(meet_after_error, seconds=2)
    said: list[str] = []
    with mock.patch.object(saving, "meet_after_error", meet):
        try:
            trainer.fit(module)
        except Exception as error:  # noqa: BLE001
            one: BaseException | None = error
            while one is not None:
                said.append(f"{type(one).__name__}: {one}")
                one = one.__cause__ or one.__context__
    return said, os.listdir(directory)


def one_comes_to_save(path: str) -> list[tuple[str, str]]:
    """What ranks get when only rank 1 comes, then both, then rank 0 after rank 1 has given up."""
    dist.init_process_group("gloo")
    errors = []
    for step, ranks in ((1, [1]), (2, [0, 1]), (1, [0])):
        if dist.get_rank() in ranks:
            errors.append(error_of(meet_after_error, Path(path), step, seconds=0.5))
        dist.barrier()
    return errors
