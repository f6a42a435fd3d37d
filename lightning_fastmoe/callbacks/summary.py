"""MoESummary: what a run will train, and what it will hold in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fastmoe.sizes import LayerSize, ModelSize, model_size
from lightning_fastmoe.strategy import FastMoEStrategy
from lightning_fastmoe.strategy.memory import (
    Bytes,
    MemoryPlan,
    groups_of,
    optimizer_state_bytes,
    plan,
)


class MoESummary(pl.Callback):
    """Prints, when a fit starts, parameters and bytes per rank; before DeepSpeed allocates them.

    All and active parameters, experts per rank, the expert parallel groups, ZeRO stage, precision,
    and what a rank will hold for weights, gradients, optimizer and communication buffers
    (Rajbhandari et al. 2020, "ZeRO"; what DeepSpeed really holds differs from the paper's formulas,
    and the numbers are DeepSpeed's). Activations are not included. Under other strategies than
    FastMoEStrategy the parameters alone.

    Attributes:
        size: the counted parameters, once a fit has started.
        memory: the plan, likewise; None under other strategies.
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
                _print(parameters_text(self.size))

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
                f"Ranks: {strategy.world_size}; expert parallel {mesh.ep_size}, expert data"
                f" parallel {mesh.edp_size}; ZeRO stage {zero['stage']};"
                f" {strategy.precision_plugin.precision}; {type(optimizer).__name__}."
            )
            _print([*parameters_text(self.size), ranks, *memory_text(self.memory)])


def _print(lines: Iterable[str]) -> None:
    sys.stdout.write("\n".join(["", *lines, "", ""]))
    sys.stdout.flush()


def parameters_text(size: ModelSize) -> list[str]:
    """Lines about parameters; layers that are alike share one."""
    share = size.active / max(size.total, 1)
    lines = [
        f"Parameters: {_count(size.total)}, of which a token uses {_count(size.active)}"
        f" ({share:.0%}); {_count(size.dense)} outside of experts."
    ]
    kinds: dict[LayerSize, list[str]] = {}
    for name, layer in size.layers.items():
        kinds.setdefault(layer, []).append(name)
    for layer, names in kinds.items():
        where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        lines.append(
            f"{len(names)} MoE layer{'s' * (len(names) > 1)} ({where}):"
            f" {layer.num_experts} experts of {_count(round(layer.parameters_per_expert))},"
            f" {layer.num_local_experts} on this rank, {layer.experts_per_token:g} per token."
        )
    return lines


def memory_text(memory: MemoryPlan) -> list[str]:
    """A table of bytes per rank."""
    table: list[Sequence[str]] = [("per rank", "dense", "experts", "together")]
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer and fp32 weights",
        "buffers": "communication buffers",
    }
    for name, label in names.items():
        parts = [getattr(x, name) for x in (memory.dense, memory.experts, memory.total)]
        where = " (host)" if name in memory.total.on_host else ""
        shown = ["", ""] if name == "buffers" else [_size(x) for x in parts[:2]]
        table.append((label + where, *shown, _size(parts[2])))
    table.append(("on the device", *(_size(x.device) for x in _columns(memory))))
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines.append("Activations, and what stage 3 gathers for a moment, come on top.")
    if memory.state_bytes is None:
        lines.append("The optimizer's own states are unknown, and not included.")
    return lines


def _columns(memory: MemoryPlan) -> tuple[Bytes, Bytes, Bytes]:
    return memory.dense, memory.experts, memory.total


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"
