"""ThroughputMonitor: tokens per second and model FLOPs utilisation (MFU) of MoE models."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks
from pytorch_lightning.callbacks.throughput_monitor import _plugin_to_compute_dtype
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.data import extract_batch_size
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import Routing
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.planning.sizes import ModelSize, model_size

FORWARD, BACKWARD = 2, 4
"""FLOPs per parameter and token: a multiplication and an addition, once and twice."""


class ThroughputMonitor(callbacks.ThroughputMonitor):
    """Lightning's ThroughputMonitor, with FLOPs counted for mixture-of-experts models.

    Lightning's needs ``flops_per_batch`` from the module, and functions that count samples and
    items. This one counts what passes through the MoE layers of rank zero::

        FLOPs of a batch = 6 * (dense * tokens + sum over MoE layers of pairs * per_expert)

    where ``dense`` excludes embedding tables, which are looked up rather than multiplied,
    ``tokens`` are those of the layer that saw most, and ``pairs`` are a layer's (token, expert)
    pairs: K per token for top-k routing. That is 6 * active parameters * tokens, as in PaLM
    (Chowdhery et al. 2022, appendix B), without recomputation of activations; in evaluation the
    factor is 2 instead of 6. Attention's product of queries and keys has no parameters: account
    for it by ``extra_flops_per_token``.

    The logged names are Lightning's: ``train/device/items_per_sec`` (items are tokens, per rank;
    ``train/items_per_sec`` over all ranks), ``train/device/flops_per_sec``, ``train/device/mfu``
    (FLOPs per second over ``peak_flops``), and so on, once ``window_size`` batches are done.
    Numbers over all ranks are rank zero's times the number of ranks.

    If the module has ``flops_per_batch``, that is used, as in Lightning.

    Args:
        peak_flops: peak FLOPs per second of one device in the precision of the run. None looks it
            up in Lightning's table, which lacks CPUs and some GPUs; without an entry no ``mfu`` is
            logged. "measured" times large matrix products on the device at the start.
        extra_flops_per_token: FLOPs of a forward pass besides the parameters'; for causal attention
            ``4 * layers * d_model * seq_len / 2``.
        batch_size_fn: samples in a batch; None finds the batch dimension as Lightning does.
        length_fn: tokens in a batch; None counts what passes through the MoE layers.
        window_size: batches to average over, at least 2.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self,
        peak_flops: float | Literal["measured"] | None = None,
        extra_flops_per_token: float = 0.0,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        window_size: int = 20,
    ) -> None:
        if window_size < 2:
            raise ConfigError(f"window_size={window_size} is invalid: it must be at least 2.")
        if isinstance(peak_flops, str) and peak_flops != "measured":
            raise ConfigError(
                f"peak_flops={peak_flops!r} is unknown: give a number of FLOPs per second,"
                " 'measured', or None."
            )
        if not isinstance(peak_flops, str) and peak_flops is not None and not peak_flops > 0:
            raise ConfigError(f"peak_flops={peak_flops!r} is invalid: it must be positive.")
        super().__init__(
            batch_size_fn=batch_size_fn or extract_batch_size,
            length_fn=length_fn or self._tokens_of,
            window_size=window_size,
        )
        self.peak_flops = peak_flops
        self.extra_flops_per_token = extra_flops_per_token
        self._size: ModelSize | None = None
        self._tokens: dict[str, int] = {}
        self._pairs: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def _tokens_of(self, batch: Any) -> int:
        return max(self._tokens.values(), default=0)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.peak_flops is None:
            return
        if self.peak_flops == "measured":
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self.available_flops = int(measure_peak_flops(trainer.strategy.root_device, dtype))
        else:
            self.available_flops = int(self.peak_flops)
        for throughput in self._throughputs.values():
            throughput.available_flops = self.available_flops

    def _begin(self, module: pl.LightningModule) -> None:
        """Counts parameters and starts observing the layers; all ranks must call it."""
        self._end()
        self._size = model_size(module)
        for name, layer in expert_layers(module):
            self._handles.append(layer.register_routing_observer(self._observer(name)))

    def _observer(self, name: str) -> Callable[[ExpertLayer, Routing], None]:
        def observe(layer: ExpertLayer, routing: Routing) -> None:
            # Tensor sizes, which the host knows without a sync.
            self._tokens[name] = self._tokens.get(name, 0) + routing.scores.shape[0]
            self._pairs[name] = self._pairs.get(name, 0) + routing.expert_ids.numel()

        return observe

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def _forget(self) -> None:
        self._tokens, self._pairs = {}, {}

    def flops_of_batch(self, factor: int) -> int:
        """FLOPs of the current batch, from what passed through the layers.

        Args:
            factor: FLOPs per parameter and token.
        """
        assert self._size is not None
        tokens = max(self._tokens.values(), default=0)
        used: float = tokens * (self._size.dense - self._size.lookups)
        for name, pairs in self._pairs.items():
            used += pairs * self._size.layers[name].parameters_per_expert
        extra = tokens * self.extra_flops_per_token * factor / FORWARD
        return round(factor * used + extra)

    @override
    def _update(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, iter_num: int
    ) -> None:
        source: Any = pl_module
        if not hasattr(pl_module, "flops_per_batch"):
            training = trainer.state.stage == RunningStage.TRAINING
            flops = self.flops_of_batch(FORWARD + BACKWARD if training else FORWARD)
            source = SimpleNamespace(flops_per_batch=flops)
        super()._update(trainer, source, batch, iter_num)
        self._forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        self._forget()

    @override
    def on_validation_batch_start(self, *args: Any) -> None:
        self._forget()

    @override
    def on_test_batch_start(self, *args: Any) -> None:
        self._forget()

    @override
    def on_predict_batch_start(self, *args: Any) -> None:
        self._forget()

    @override
    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._end()

    @override
    def on_exception(self, *args: Any) -> None:
        self._end()

    @override
    def on_test_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._begin(trainer.lightning_module)
        super().on_test_start(trainer, *args)

    @override
    def on_predict_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._begin(trainer.lightning_module)
        super().on_predict_start(trainer, *args)

    @override
    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self._handles:  # not inside a fit
            self._begin(trainer.lightning_module)
        super().on_validation_start(trainer, *args)


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOPs per second of large matrix products, best of several.

    Args:
        device: CUDA or CPU.
        dtype: the dtype of the matrices.
        seconds: approximate duration of the measurement.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)

    def timed() -> float:
        if device.type == "cuda":
            # By the device's clock: the host's also sees who else uses the device.
            with torch.cuda.device(device):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                torch.mm(a, b)
                end.record()
                end.synchronize()
            return float(begin.elapsed_time(end)) / 1000
        start = time.perf_counter()
        torch.mm(a, b)
        return time.perf_counter() - start

    timed()  # warms up
    until, times = time.monotonic() + seconds, [timed()]
    while time.monotonic() < until:
        times.append(timed())
    return 2.0 * size**3 / min(times)
