"""What the ranks run in test_balancing_terms.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import Logger
from strategy.models import D_MODEL, Case, Net
from strategy.tracing import Tracer, make_trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe import ExpertLoadMonitor, moe_losses
from lightning_fastmoe.nn import MoE, Routing, moe_layers


class Memory(Logger):
    """Keeps what was logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {k: v for k, v in metrics.items() if k.startswith("moe/")}
        if values:
            self.logged.setdefault(-1 if step is None else step, {}).update(values)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""


class CountedMonitor(ExpertLoadMonitor):
    """Counts the all-reduces of each batch end."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder=folder)
        self.reductions: list[int] = []
        self.opened = False

    def on_train_batch_end(self, *args: Any) -> None:
        original, count = dist.all_reduce, [0]

        def counted(*a: Any, **k: Any) -> Any:
            count[0] += 1
            return original(*a, **k)

        dist.all_reduce = counted
        try:
            super().on_train_batch_end(*args)
        finally:
            dist.all_reduce = original
        self.reductions.append(count[0])
        self.opened |= self._writer is not None


@dataclass
class Monitored:
    """This rank's log, its all-reduces, and every routing: (layer, expert ids, scores)."""

    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    reductions: list[int] = field(default_factory=list)
    routings: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    shown: dict[str, float] = field(default_factory=dict)
    called_back: dict[str, float] = field(default_factory=dict)
    opened: bool = False


def monitor(case: Case, every: int, folder: str) -> Monitored:
    """Trains under a monitor, and notes every routing beside it."""
    pl.seed_everything(7, verbose=False)
    module, logger, callback = Net(case), Memory(), CountedMonitor(folder)
    result = Monitored()
    names = {id(layer): name for name, layer in moe_layers(module)}

    def observe(layer: MoE, routing: Routing) -> None:
        scores = routing.scores.detach()
        result.routings.append((names[id(layer)], routing.expert_ids, scores))

    for _, layer in moe_layers(module):
        layer.register_routing_observer(observe)
    trainer = make_trainer(case, callbacks=[callback], logger=logger, log_every_n_steps=every)
    trainer.fit(module)
    result.opened = callback.opened
    result.logged, result.reductions = logger.logged, callback.reductions
    keys = ("max_load", "dead_experts")
    result.shown = {key: float(trainer.progress_bar_metrics[key]) for key in keys}
    values = trainer.callback_metrics.items()
    result.called_back = {k: float(v) for k, v in values if k.startswith("moe/")}
    return result


class ByHand(Net):
    """Adds the terms to its loss, as those do who want to see them there."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + sum(moe_losses(self).values())


class Checkpointed(Net):
    """Recomputes the MoE layers' activations in the backward pass."""

    def __init__(self, case: Case, how: str) -> None:
        super().__init__(case)
        self.how = how
        # DeepSpeed can't reduce the gradient of a parameter of two re-entrant checkpoints.
        self.norms = nn.ModuleList(nn.LayerNorm(D_MODEL) for _ in case.num_experts)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        net = self.net
        h = net["embed"](batch)
        for norm, layer in zip(self.norms, net["moes"], strict=True):
            h = self._block(norm, layer, h)
        target = torch.sin(3 * batch.sum(-1, keepdim=True))
        loss: Tensor = (net["head"](h) - target).square().mean()
        self.batch_losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)

    def _block(self, norm: nn.Module, layer: nn.Module, h: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            y: Tensor = x + layer(norm(x))
            return y

        if self.how == "none":
            return block(h)
        if self.how == "deepspeed":
            from deepspeed.runtime.activation_checkpointing import checkpointing

            y: Tensor = checkpointing.checkpoint(block, h)
            return y
        recomputed: Tensor = checkpoint(block, h, use_reentrant=self.how == "reentrant")
        return recomputed


@dataclass
class Fitted:
    """Losses, weights after each step, and how many tokens the observers saw."""

    losses: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    observed: int = 0


def fit(case: Case, how: str) -> Fitted:
    """Trains with the terms acting as ``how`` says, or with activation checkpointing."""
    pl.seed_everything(7, verbose=False)
    kinds = {"attached": Net, "by hand": ByHand}
    module = kinds[how](case) if how in kinds else Checkpointed(case, how)
    seen = [0]

    def observe(layer: MoE, routing: Routing) -> None:
        seen[0] += len(routing.expert_ids)

    for _, layer in moe_layers(module):
        layer.register_routing_observer(observe)
    tracer = Tracer()
    make_trainer(case, callbacks=[tracer]).fit(module)
    return Fitted(module.batch_losses, tracer.trace.weights, seen[0])
