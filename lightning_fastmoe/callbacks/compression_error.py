"""CompressionErrorMonitor: what int8 or int4 experts would change, on validation or test data."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.compression_meter import CompressionErrors, CompressionMeter
from lightning_fastmoe.ops.group_quantization import bits_of


class CompressionErrorMonitor(pl.Callback):
    """Measures by how much compressed experts would change each layer's output.

    For ``Trainer.validate``, ``test`` and ``predict`` with exact weights: under ``OffloadStrategy``
    without ``compression``, or any strategy that keeps all experts of a layer in one process. Each
    layer's experts run a second time with rounded weights, on the inputs of the exact model; the
    results of the run stay exact. At its end, a table is printed, and the loggers get a
    ``compression_error/LAYER`` for each layer. What all layers together change in a loss, a second
    run with ``OffloadStrategy(compression=...)`` shows, or
    :func:`~lightning_fastmoe.inference.compression_meter.compression_error`.

    Args:
        compression: what is to be measured.
        batches: the first so many of a run; None measures all.

    Attributes:
        errors: those of the last run, once it has ended.

    Raises:
        ConfigError: if an argument is invalid; at the start of a run, if the model has no layers
            with experts, or their weights are compressed or sharded.
    """

    def __init__(
        self, compression: Literal["int8", "int4"] = "int8", batches: int | None = 8
    ) -> None:
        bits_of(compression)
        if batches is not None and batches < 1:
            raise ConfigError(f"batches={batches} is invalid: it must be at least 1, or None.")
        self.compression, self.batches = compression, batches
        self.errors: CompressionErrors | None = None
        self._meter: CompressionMeter | None = None
        self._left = 0

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._start(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._count()

    @override
    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._count()

    @override
    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._count()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._drop()

    def _start(self, model: pl.LightningModule) -> None:
        self._drop()
        self._meter = CompressionMeter(model, self.compression)
        self._left = -1 if self.batches is None else self.batches

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0 and self._meter is not None:
            self._meter.close()  # it keeps what it has measured

    def _end(self, trainer: pl.Trainer) -> None:
        if self._meter is None:
            return
        self.errors = self._meter.errors()
        self._drop()
        rank_zero_info(self.errors.text())
        values = {f"compression_error/{k}": v for k, v in self.errors.layers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _drop(self) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter = None
