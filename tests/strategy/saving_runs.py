"""What the ranks run in test_model_checkpoint.py and test_async.py."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.models import Case
from strategy.resume_runs import Resumed, error_of, trainer_for
from strategy.tracing import whole_weights

from lightning_fastmoe.checkpoint.background import WRITER
from lightning_fastmoe.checkpoint.format import safetensors_stream, writer

write_all, write_shard = safetensors_stream.files.write_all, writer.write_shard

# ------------------------------------------------------------------------ ModelCheckpoint's options


class Scored(Resumed):
    """Logs scores that rise and fall: 3, 1, 2, 0 in epochs 0 to 3."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        score = float((3, 1, 2, 0)[self.trainer.current_epoch % 4])
        self.log("score", score, on_epoch=True, on_step=False, sync_dist=True)
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("steps_seen", self.steps_seen.float())

    def predict_step(self, batch: Any, batch_idx: int) -> float:
        return float(self.steps_seen)

    test_dataloader = predict_dataloader = Resumed.val_dataloader


@dataclass
class Listing:
    """What a run left, and what loading by words gave."""

    names: list[str]
    links: dict[str, str]
    best: str
    last: str
    seen: dict[str, float] = field(default_factory=dict)


def with_callback(
    case: Case,
    directory: str,
    options: dict[str, Any],
    words: list[str],
    trainer_options: dict[str, Any] | None = None,
    seconds: float = 0.0,
) -> Listing:
    """Trains four epochs of one step; then tests, or predicts, from "best" and "last".

    Each buffer takes some ``seconds`` to be written.
    """
    pl.seed_everything(7, verbose=False)
    callback = ModelCheckpoint(directory, **options)
    trainer = trainer_for(
        case, 4, callbacks=[callback], enable_checkpointing=True, **trainer_options or {}
    )
    with slow_writes(seconds):
        trainer.fit(Scored(case, "cosine"))
    trainer.strategy.barrier()  # rank 0 alone deletes
    result = listing(Path(directory), callback)
    assert "file_exists" not in vars(callback)
    for word in words:
        (logged,) = trainer.test(Scored(case, "cosine"), ckpt_path=word, verbose=False)
        result.seen[word] = logged["steps_seen"]
        (predicted,) = trainer.predict(Scored(case, "cosine"), ckpt_path=word)
        assert predicted == logged["steps_seen"]
    return result


def listing(directory: Path, callback: ModelCheckpoint) -> Listing:
    names = sorted(os.listdir(directory))
    links = {n: os.readlink(directory / n) for n in names if (directory / n).is_symlink()}
    words = (callback.best_model_path, callback.last_model_path)
    return Listing(names, links, *(Path(word).name for word in words))


def interval_then_resume(case: Case, directory: str) -> tuple[list[str], int]:
    """Saves every two steps, without an end; resumes from "last"; (names, step resumed from)."""
    options = {"every_n_train_steps": 2, "save_top_k": -1, "save_last": True}
    callback = ModelCheckpoint(directory, **options)
    trainer = trainer_for(case, 5, callbacks=[callback], enable_checkpointing=True)
    trainer.fit(Scored(case, "cosine"))
    names = sorted(os.listdir(directory))
    again = trainer_for(
        case, 5, callbacks=[ModelCheckpoint(directory, **options)], enable_checkpointing=True
    )
    module = Scored(case, "cosine")
    again.fit(module, ckpt_path="last")
    return names, len(module.batch_losses)


# ---------------------------------------------------------------------------------- in background


@contextmanager
def slow_writes(seconds: float) -> Iterator[None]:
    def slowly(fd: int, view: memoryview) -> None:
        time.sleep(seconds)
        write_all(fd, view)

    with mock.patch.object(safetensors_stream.files, "write_all", slowly):
        yield


class SaveOnce(pl.Callback):
    """Saves after the first epoch and notes when the checkpoint appears."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.there: list[bool] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.there.append(self.path.exists())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def saved_while_training(case: Case, directory: str) -> tuple[list[bool], Any, Any]:
    """One run with, one without async saving; (when it was there, weights of both at the end)."""
    ends = []
    there: list[bool] = []
    for is_async in (True, False):
        pl.seed_everything(7, verbose=False)
        module = Scored(case, "cosine")
        saver = SaveOnce(str(Path(directory) / ("async.ckpt" if is_async else "sync.ckpt")))
        own = replace(case, extra={"async_checkpoint": is_async})
        with slow_writes(0.5 if is_async else 0.0):
            trainer_for(own, 4, callbacks=[saver]).fit(module)
        assert saver.path.is_dir(), "the end of a run waits for the last checkpoint"
        ends.append(whole_weights(module.net))
        there = there or saver.there
    return there, *ends


class Noted(pl.Callback):
    """Counts steps; each begins when no save is in progress any more."""

    steps = 0

    def on_train_batch_start(self, *args: Any) -> None:
        for thread in threading.enumerate():  # as if steps took longer than a save
            if thread.name == WRITER:
                thread.join(20)

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


def failing_in_background(case: Case, directory: str) -> tuple[tuple[str, str], int, list[str]]:
    """Keeps the best alone; the second save fails on rank 1. (error, steps taken, what is left)."""
    case = replace(case, extra={"async_checkpoint": True})
    callback = ModelCheckpoint(
        directory, monitor="score", save_top_k=1, filename="{epoch}", save_on_train_epoch_end=True
    )
    noted = Noted()
    trainer = trainer_for(case, 4, callbacks=[callback, noted], enable_checkpointing=True)

    def failing(path: Path, *args: Any) -> Any:
        if dist.get_rank() == 1 and "epoch=1" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_shard(path, *args)

    with mock.patch.object(writer, "write_shard", failing):
        error = error_of(trainer.fit, Scored(case, "cosine"))
    return error, noted.steps, sorted(os.listdir(directory))


def failing_at_the_end(case: Case, directory: str) -> list[tuple[str, str]]:
    """Errors of the last save of a run, and of one after it."""
    case = replace(case, extra={"async_checkpoint": True})
    callback = ModelCheckpoint(directory, save_top_k=-1, every_n_epochs=4)
    trainer = trainer_for(case, 4, callbacks=[callback], enable_checkpointing=True)
    with mock.patch.object(safetensors_stream.files, "write_all", side_effect=OSError(5, "broken")):
        at_end = error_of(trainer.fit, Scored(case, "cosine"))
    trainer = trainer_for(case, 1)
    trainer.fit(Scored(case, "cosine"))
    with mock.patch.object(safetensors_stream.files, "write_all", side_effect=OSError(5, "broken")):
        after = error_of(trainer.save_checkpoint, str(Path(directory) / "after.ckpt"))
    return [at_end, after]


def linked(case: Case, directory: str) -> tuple[str, str]:
    """The error of linking to what is still being written."""
    case = replace(case, extra={"async_checkpoint": True})
    callback = ModelCheckpoint(directory, save_last="link")
    trainer = trainer_for(case, 1, callbacks=[callback], enable_checkpointing=True)
    return error_of(trainer.fit, Scored(case, "cosine"))


def refused_paths(case: Case, paths: list[str]) -> list[tuple[str, str]]:
    """Errors of saving to paths that are none."""
    trainer = trainer_for(case, 1)
    trainer.fit(Scored(case, "cosine"))
    module = Scored(case, "cosine")
    callbacks = [ModelCheckpoint("memory://checkpoints")]
    never = trainer_for(case, 1, callbacks=callbacks, enable_checkpointing=True)
    errors = [error_of(trainer.save_checkpoint, path) for path in paths]
    errors += [error_of(never.fit, module)]
    assert not module.batch_losses, "refused before training starts"
    return errors


# ------------------------------------------------------------------------------ lost and put back


def without_a_name(case: Case, directory: str) -> tuple[tuple[str, str], int]:
    """(error of looking for "last" once a save died between two renames, steps of a second try)."""
    folder = Path(directory)
    keep = {"save_last": True, "save_top_k": 0}
    callbacks = [ModelCheckpoint(directory, **keep)]
    trainer = trainer_for(case, 3, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(Scored(case, "cosine"))
    if dist.get_rank() == 0:
        os.rename(folder / "last.ckpt", folder / ".last.ckpt.fastmoe-old")
    trainer.strategy.barrier()

    def again() -> int:
        module = Scored(case, "cosine")
        callbacks = [ModelCheckpoint(directory, **keep)]
        trainer = trainer_for(case, 4, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, ckpt_path="last")
        return len(module.batch_losses)

    return error_of(again), again()
