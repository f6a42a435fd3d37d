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
    """Lets the callbacks find a name taken as soon as a save to it has begun.

    ``ModelCheckpoint`` keeps checkpoints of one name apart by a counter (``b.ckpt``, ``b-v1.ckpt``)
    and looks on the disk for the names that are taken. A checkpoint in the making is not there yet:
    the next one would get the same name and replace it, though it may be the best.

    Args:
        trainer: whose checkpoint callbacks to tell.
        is_pending: whether a save to a path is in progress; the same on all ranks.

    Returns:
        What gives the callbacks their own methods back.
    """
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]

    def forget() -> None:
        for callback in callbacks:
            vars(callback).pop(_METHOD, None)

    forget()  # a run before may have ended without notice
    for callback in callbacks:
        vars(callback)[_METHOD] = _counting(callback.file_exists, is_pending)
    return forget


def _counting(on_disk: Callable[..., bool], is_pending: Callable[[Path], bool]) -> Any:
    def file_exists(filepath: Any, trainer: pl.Trainer) -> bool:
        # The ranks talk to each other in the first; so it comes first on all of them.
        return on_disk(filepath, trainer) or is_pending(Path(filepath))

    return file_exists
