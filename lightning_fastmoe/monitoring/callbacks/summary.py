"""MoESummary: prints a model's parameter counts and memory per rank."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fastmoe.monitoring.callbacks.summary_text import Summary, plain_text
from lightning_fastmoe.planning.memory import MemoryPlan, groups_of, optimizer_state_bytes, plan
from lightning_fastmoe.planning.sizes import ModelSize, model_size
from lightning_fastmoe.strategy import FastMoEStrategy


class MoESummary(pl.Callback):
    """Prints parameter counts and bytes per rank when a fit starts, before DeepSpeed allocates.

    Total and active parameters, experts per rank, the expert parallel groups, ZeRO stage,
    precision, and each rank's memory for weights, gradients, optimizer and communication buffers
    (Rajbhandari et al. 2020, "ZeRO"; where DeepSpeed's actual allocations differ from the paper's
    formulas, the numbers are DeepSpeed's). Activations are not included. Under strategies other
    than FastMoEStrategy only the parameters. Tables if ``rich`` is installed, else plain text.

    Attributes:
        size: the parameter counts, once a fit has started.
        memory: the memory plan, once a fit has started; None under other strategies.
    """

    def __init__(self) -> None:
        self.size: ModelSize | None = None
        self.memory: MemoryPlan | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if stage == "fit" and isinstance(strategy, FastMoEStrategy):

            def summarize(model: nn.Module, optimizer: Optimizer) -> None:
                self._summarize(strategy, model, optimizer)
                strategy.before_engine.remove(summarize)

            strategy.before_engine.append(summarize)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, FastMoEStrategy):
            self.size, self.memory = model_size(pl_module), None
            if trainer.is_global_zero:
                _print(Summary(self.size))

    def _summarize(self, strategy: FastMoEStrategy, model: nn.Module, optimizer: Optimizer) -> None:
        self.size = model_size(model)
        mesh = strategy.expert_mesh
        assert isinstance(strategy.config, dict)
        zero = strategy.config["zero_optimization"]
        dtype = strategy.precision_plugin._desired_dtype  # type: ignore[attr-defined]
        self.memory = plan(
            groups_of(model, optimizer, strategy.world_size, mesh.edp_size),
            stage=zero["stage"],
            itemsize=dtype.itemsize,
            state_bytes=optimizer_state_bytes(optimizer),
            config=zero,
        )
        if strategy.is_global_zero:
            ranks = (
                f"{strategy.world_size}; expert parallel {mesh.ep_size}, expert data"
                f" parallel {mesh.edp_size}; ZeRO stage {zero['stage']};"
                f" {strategy.precision_plugin.precision}; {type(optimizer).__name__}."
            )
            _print(Summary(self.size, self.memory, ranks))


def _print(summary: Summary) -> None:
    if find_spec("rich") is None:
        sys.stdout.write(plain_text(summary))
    else:
        from lightning_fastmoe.monitoring.callbacks.summary_tables import print_tables

        print_tables(summary)
    sys.stdout.flush()
