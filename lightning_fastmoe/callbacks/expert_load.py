"""ExpertLoadMonitor: are the experts alive?"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.metrics import ExpertLoad
from lightning_fastmoe.nn import MoE, Routing, moe_layers


class ExpertLoadMonitor(pl.Callback):
    """Logs how evenly each MoE layer uses its experts, over all ranks and micro-batches.

    Per layer, over the steps since the last logging step: ``max_load`` and ``min_load`` (an
    expert's load over the mean load: 1 is balanced, 0 is dead), ``load_cv`` (coefficient of
    variation), ``dead_experts`` and the router's ``entropy`` (nats per token), besides the values
    of the balancing losses on this rank. To the progress bar: the largest load ratio and the number
    of dead experts over all layers. One all-reduce per logging step, whatever the number of layers.

    Args:
        every_n_steps: optimizer steps between two logs; None follows ``log_every_n_steps``.
        prefix: before each name.

    Raises:
        ConfigError: if ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int | None = None, prefix: str = "moe") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(
                f"every_n_steps={every_n_steps} is invalid: it must be at least 1, or None."
            )
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self._metric: ExpertLoad | None = None
        self._handles: list[RemovableHandle] = []
        self._layers: list[tuple[str, MoE]] = []
        self._logged_step = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._layers = list(moe_layers(pl_module))
        names = [name for name, _ in self._layers]
        self._metric = ExpertLoad([layer.num_experts for _, layer in self._layers], names)
        self._metric.to(trainer.strategy.root_device)
        index = {id(layer): i for i, (_, layer) in enumerate(self._layers)}

        def observe(layer: MoE, routing: Routing) -> None:
            if layer.training and self._metric is not None:
                self._metric.update(index[id(layer)], routing)

        self._handles = [layer.register_routing_observer(observe) for _, layer in self._layers]
        self._logged_step = trainer.global_step

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
        if not (self._layers and every) or step == self._logged_step or step % every:
            return
        self._logged_step = step
        self._log(trainer, self._collect())

    def _collect(self) -> dict[str, Tensor]:
        """The values since the last call, over all ranks, by one all-reduce."""
        assert self._metric is not None
        packed = self._metric.packed.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed)
        self._metric.reset()
        values = self._metric.summarize(packed.cpu())
        for name, layer in self._layers:
            for key, value in layer.last_losses.items():
                values[f"{name}/{key}_loss"] = value
        return values

    def _log(self, trainer: pl.Trainer, values: dict[str, Tensor]) -> None:
        numbers = {f"{self.prefix}/{k}": float(v) for k, v in values.items()}
        # Lightning's own training metrics of this step go under the same number.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in numbers.items()})
        largest = [v for k, v in numbers.items() if k.endswith("/max_load")]
        dead = [v for k, v in numbers.items() if k.endswith("/dead_experts")]
        if largest:
            trainer.progress_bar_metrics.update(
                {"max_load": max(largest), "dead_experts": int(sum(dead))}
            )

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
