"""CoActivationMonitor: records which experts are chosen together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.monitoring.callbacks.expert_load import logged_as, run_folder
from lightning_fastmoe.monitoring.logs import co_activation as co_activation_log
from lightning_fastmoe.monitoring.metrics import ExpertCoActivation
from lightning_fastmoe.nn.expert_layers import expert_layers


class CoActivationMonitor(pl.Callback):
    """Records which experts tokens choose together, for ``lightning-fastmoe report``.

    Writes each MoE layer's :class:`~lightning_fastmoe.metrics.ExpertCoActivation` counts, over all
    ranks and micro-batches since the last write, to ``co_activation.json`` in the run's folder,
    replacing the previous file; :mod:`lightning_fastmoe.monitoring.logs.co_activation` describes
    the format. Only rank zero writes.

    Each forward pass multiplies two (T, E) matrices per layer, and each write sums E * E counts per
    layer over ranks, so use it for part of a run rather than for all of it.

    Args:
        every_n_steps: optimizer steps between two files; None follows ``log_every_n_steps``.
        folder: the run's folder; None uses the first logger's. Without either, nothing is written.

    Raises:
        ConfigError: if ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int | None = None, folder: str | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(
                f"every_n_steps={every_n_steps} is invalid: it must be at least 1, or None."
            )
        self.every_n_steps = every_n_steps
        self.folder = folder
        self._metrics: dict[str, ExpertCoActivation] = {}
        self._handles: list[RemovableHandle] = []
        self._opened = False
        self._written_step = self._first_step = 0
        self._run_folder: Path | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()
        self._opened = False
        device = trainer.strategy.root_device
        for name, layer in expert_layers(pl_module):
            metric = ExpertCoActivation(layer.num_experts).to(device)
            self._metrics[name] = metric
            self._handles.append(metric.observe(layer))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not earlier: a resumed run's step is only restored by now.
        if not self._opened:
            self._opened = True
            self._written_step = trainer.global_step
            self._first_step = logged_as(trainer)
            self._run_folder = run_folder(trainer, self.folder)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if not (self._metrics and every) or step == self._written_step or step % every:
            return
        self._written_step = step
        layers = self._collect()
        last = logged_as(trainer)
        if trainer.is_global_zero and self._run_folder is not None:
            co_activation_log.write(
                self._run_folder, co_activation_log.CoActivationLog(self._first_step, last, layers)
            )
        self._first_step = last + 1

    def _collect(self) -> list[co_activation_log.LayerCoActivation]:
        """The counts since the last call, over all ranks, by one all-reduce."""
        packed = torch.cat([metric.together.flatten() for metric in self._metrics.values()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed)
        sizes = [metric.num_experts**2 for metric in self._metrics.values()]
        layers = []
        for (name, metric), counts in zip(
            self._metrics.items(), packed.cpu().split(sizes), strict=True
        ):
            metric.reset()
            rows = counts.view(metric.num_experts, -1).tolist()
            layers.append(co_activation_log.LayerCoActivation(name, rows))
        return layers

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._metrics = {}
