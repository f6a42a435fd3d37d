"""Makes ModelCheckpoint count checkpoints that are still being written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

_METHOD = "file_exists"


def count_pending_names(
    trainer: pl.Trainer, is_pending: Callable[[Path], bool]
) -> Callable[[], None]:
    """Makes the callbacks treat a name as taken as soon as a save to it has begun.

    ``ModelCheckpoint`` numbers checkpoints of the same name (``b.ckpt``, ``b-v1.ckpt``) and looks
    on disk for names that are taken. A checkpoint that is still being written isn't there yet, so
    the next one would get the same name and replace it, though it may be the best.

    Args:
        trainer: the Trainer with the checkpoint callbacks.
        is_pending: whether a save to a path is in progress; the same on all ranks.

    Returns:
        A function that restores the callbacks' methods.
    """
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]

    def forget() -> None:
        for callback in callbacks:
            vars(callback).pop(_METHOD, None)

    forget()  # an earlier run may have ended without a teardown
    for callback in callbacks:
        vars(callback)[_METHOD] = _counting(callback.file_exists, is_pending)
    return forget


def _counting(on_disk: Callable[..., bool], is_pending: Callable[[Path], bool]) -> Any:
    def file_exists(filepath: Any, trainer: pl.Trainer) -> bool:
        # on_disk communicates between ranks, so every rank must call it, and first.
        return on_disk(filepath, trainer) or is_pending(Path(filepath))

    return file_exists
