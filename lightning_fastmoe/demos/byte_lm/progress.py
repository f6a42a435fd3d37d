"""A progress bar that works in runs that resume within an epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import TQDMProgressBar
from typing_extensions import override


class TrainingBar(TQDMProgressBar):
    """Lightning's progress bar, with the right total when a run resumes within an epoch.

    Lightning sets the total when an epoch starts, which doesn't happen again in a resumed epoch.

    Args:
        refresh_rate: steps between two updates.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start(trainer, pl_module)
            done = trainer.fit_loop.batch_idx + 1
            # Lightning's total counts the remaining batches; its position starts at those done.
            self.train_progress_bar.total = done + self.train_progress_bar.total
            self.train_progress_bar.initial = self.train_progress_bar.n = done

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)  # the version of the log folder, which is noise here
        return metrics
