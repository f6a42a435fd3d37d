"""ExpertLoadMonitor: logs how evenly experts are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.monitoring.callbacks.load_figures import (
    LoadHistory,
    check_matplotlib,
    draw_loads,
    publish,
)
from lightning_fastmoe.monitoring.callbacks.loss_means import LossMeans
from lightning_fastmoe.monitoring.logs import expert_load as load_log
from lightning_fastmoe.monitoring.metrics import ExpertLoad
from lightning_fastmoe.monitoring.metrics.expert_load import LayerLoad
from lightning_fastmoe.nn import MoE, Routing
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers


class ExpertLoadMonitor(pl.Callback):
    """Logs how evenly each MoE layer uses its experts, over all ranks and micro-batches.

    Per layer, over the steps since the last logging step: ``max_load`` and ``min_load`` (an
    expert's load over the mean load: 1 is balanced, 0 is dead), ``load_cv`` (coefficient of
    variation), ``dead_experts``, ``drop_rate``, the router's ``entropy`` (nats per token) and
    ``confidence`` (a token's best score); see :mod:`lightning_fastmoe.metrics` for the formulas.
    Also logs the means of the balancing losses, before their coefficients. The progress bar shows
    the largest load ratio and the number of dead experts over all layers. One all-reduce per
    logging step, for any number of layers. Of transformers' models under
    ``experts_implementation="fastmoe"``, whose routers keep their scores to themselves, the loads
    and counts are logged.

    The counts of every expert go to ``expert_load.jsonl`` in the run's folder, which
    ``lightning-fastmoe report`` turns into a page;
    :mod:`lightning_fastmoe.monitoring.logs.expert_load` describes the format. A resumed run appends
    to it. Only rank zero writes.

    Args:
        every_n_steps: optimizer steps between two logs; None follows ``log_every_n_steps``.
        prefix: prefix of each logged name.
        figures_every_n_steps: optimizer steps between two figures with heat maps (layer x expert,
            and every expert over time). They go to TensorBoard and W&B loggers, else into
            ``<prefix>/expert_load`` in the run's folder, as PNG. Needs matplotlib. None draws none.
        folder: the run's folder; None uses the first logger's. Without either, nothing is written.

    Raises:
        ConfigError: if a number of steps is less than 1, or matplotlib is missing.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        prefix: str = "moe",
        figures_every_n_steps: int | None = None,
        folder: str | None = None,
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("figures_every_n_steps", figures_every_n_steps),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is invalid: it must be at least 1, or None.")
        if figures_every_n_steps is not None:
            check_matplotlib()
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self.figures_every_n_steps = figures_every_n_steps
        self.folder = folder
        self._metric: ExpertLoad | None = None
        self._losses: LossMeans | None = None
        self._handles: list[RemovableHandle] = []
        self._layers: list[tuple[str, ExpertLayer]] = []
        self._logged_step = 0
        self._drawn_step = 0
        self._opened = False
        self._run_folder: Path | None = None
        self._writer: load_log.LoadLogWriter | None = None
        self._history = LoadHistory()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._layers = list(expert_layers(pl_module))
        names = [name for name, _ in self._layers]
        self._metric = ExpertLoad([layer.num_experts for _, layer in self._layers], names)
        self._metric.to(trainer.strategy.root_device)
        ours = [(name, layer) for name, layer in self._layers if isinstance(layer, MoE)]
        self._losses = LossMeans(ours, trainer.strategy.root_device)
        index = {id(layer): i for i, (_, layer) in enumerate(self._layers)}

        def observe(layer: ExpertLayer, routing: Routing) -> None:
            if layer.training and self._metric is not None:
                self._metric.update(index[id(layer)], routing)

        self._handles = [layer.register_routing_observer(observe) for _, layer in self._layers]
        self._opened = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not earlier: a resumed run's step is only restored by now.
        if self._opened or not self._layers:
            return
        self._opened = True
        self._logged_step = self._drawn_step = trainer.global_step
        self._run_folder = run_folder(trainer, self.folder)
        self._history = LoadHistory()
        if trainer.is_global_zero and self._run_folder is not None:
            self._writer = load_log.LoadLogWriter(
                self._run_folder, self._described(), first_step=logged_as(trainer)
            )
            if self.figures_every_n_steps is not None:
                earlier = load_log.read(self._writer.path).records
                self._history = LoadHistory(load_log.spans(earlier))

    def _described(self) -> list[load_log.Layer]:
        return [load_log.Layer(name, layer.num_experts) for name, layer in self._layers]

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._losses is not None:
            self._losses.add()
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if not (self._layers and every) or step == self._logged_step or step % every:
            return
        self._logged_step = step
        packed, losses = self._collect()
        self._log(trainer, self._values(packed, losses))
        if trainer.is_global_zero:
            self._record(trainer, packed)

    def _collect(self) -> tuple[Tensor, Tensor]:
        """Loads and losses since the last call, over all ranks, by one all-reduce; on the CPU."""
        assert self._metric is not None
        assert self._losses is not None
        loads = self._metric.packed
        both = torch.cat([loads.flatten(), self._losses.packed])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(both)
        shape, size = loads.shape, loads.numel()
        self._metric.reset()
        self._losses.reset()
        both = both.cpu()
        return both[:size].view(shape), both[size:]

    def _values(self, packed: Tensor, losses: Tensor) -> dict[str, Tensor]:
        assert self._metric is not None
        assert self._losses is not None
        values = self._metric.summarize(packed)
        for name, layer in self._layers:
            if not isinstance(layer, MoE):  # its scores are unknown
                for key in ("entropy", "confidence"):
                    values.pop(f"{name}/{key}", None)
        for name, loss, mean in self._losses.means(losses):
            values[f"{name}/{loss.removesuffix('_loss')}_loss"] = mean
        return values

    def _log(self, trainer: pl.Trainer, values: dict[str, Tensor]) -> None:
        numbers = {f"{self.prefix}/{k}": float(v) for k, v in values.items()}
        # The same step number as Lightning's own training metrics.
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=logged_as(trainer))
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in numbers.items()})
        largest = [v for k, v in numbers.items() if k.endswith("/max_load")]
        dead = [v for k, v in numbers.items() if k.endswith("/dead_experts")]
        if largest:
            trainer.progress_bar_metrics.update(
                {"max_load": max(largest), "dead_experts": int(sum(dead))}
            )

    def _record(self, trainer: pl.Trainer, packed: Tensor) -> None:
        """Writes to the file and the figure, on rank zero."""
        assert self._metric is not None
        by_name = {layer.name: layer for layer in self._metric.layers(packed)}
        found = [by_name.get(name) for name, _ in self._layers]
        scored = [
            x if isinstance(y, MoE) else None for x, (_, y) in zip(found, self._layers, strict=True)
        ]
        record = _as_record(logged_as(trainer), found, scored)
        if self._writer is not None:
            self._writer.write(record)
        every = self.figures_every_n_steps
        if every is None:
            return
        self._history.add(load_log.spans([record])[0])
        if trainer.global_step // every > self._drawn_step // every:
            self._drawn_step = trainer.global_step
            figure = draw_loads(self._described(), self._history.latest, self._history.columns())
            name = f"{self.prefix}/expert_load"
            publish(figure, trainer.loggers, self._run_folder, name, record.step)

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
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def run_folder(trainer: pl.Trainer, given: str | None = None) -> Path | None:
    """The folder for a run's files, identical on every rank; all ranks must call this.

    Args:
        trainer: the trainer of the run.
        given: the user's choice.

    Returns:
        ``given``; else the folder of the first logger, with the run's name and version; None
        without a logger, or with one that stores nothing on this machine.
    """
    folder: Any = given
    if given is None and trainer.loggers:
        logger = trainer.loggers[0]
        folder = getattr(logger, "log_dir", None)
        if folder is None and logger.save_dir is not None:
            version = logger.version
            version = version if isinstance(version, str) else f"version_{version}"
            folder = str(Path(logger.save_dir) / str(logger.name) / version)
    folder = trainer.strategy.broadcast(folder)
    if folder is not None and "://" in str(folder):
        rank_zero_warn(
            f"Per-expert data is not recorded: the run's folder {folder} is not on this machine."
            " Give ExpertLoadMonitor and CoActivationMonitor a local folder=."
        )
        return None
    return None if folder is None else Path(folder)


def logged_as(trainer: pl.Trainer) -> int:
    """The step number that Lightning's loggers use for this step's training metrics."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _as_record(
    step: int, layers: list[LayerLoad | None], scored: list[LayerLoad | None]
) -> load_log.Record:
    """A line of the log; ``scored`` has only the layers whose scores are known."""
    return load_log.Record(
        step,
        tokens=[None if x is None else x.tokens for x in layers],
        routed=[None if x is None else _integers(x.routed) for x in layers],
        kept=[
            None if x is None or torch.equal(x.kept, x.routed) else _integers(x.kept)
            for x in layers
        ],
        entropy=[None if x is None else x.entropy for x in scored],
        confidence=[None if x is None else x.confidence for x in scored],
    )


def _integers(counts: Tensor) -> list[int]:
    return [int(n) for n in counts.tolist()]
