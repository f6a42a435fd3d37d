"""What the ranks run in test_reshard.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from strategy.expert_modules import FROZEN as MODULES_FROZEN
from strategy.expert_modules import build_modules
from strategy.models import D_IN, Case, RankBatches
from strategy.resume_runs import Resumed, trainer_for
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS, SAVED = 6, 3
GLOBAL_BATCH, TOKENS = 4, 5
FROZEN = ("norm.weight", "moes.0.experts.up_bias")
SOME_EXPERT = {"": "up_proj", "class": "6.up.weight", "list": "4.first.weight"}
"""A trained parameter of the second layer, by kind of experts."""


@dataclass(frozen=True)
class Layout:
    """A topology."""

    world: int
    ep: int
    stage: int
    precision: str = "32-true"
    exclude_frozen: bool = False
    accelerator: str = "cpu"
    shared_gpu: bool = False
    experts: str = ""  # "class" or "list": modules instead of the stacked FFNs

    def __str__(self) -> str:
        return f"{self.experts}world{self.world}-ep{self.ep}-zero{self.stage}"

    def module(self) -> Divided:
        """The model, from new weights."""
        return WithModules(self.case(), self.experts) if self.experts else Divided(self.case())

    def case(self) -> Case:
        """The same run on any layout: the load-balancing loss, which is not linear, is off."""
        return Case(
            self.world,
            self.ep,
            self.stage,
            coefficients=(0.0, 0.001),
            steps=STEPS,
            precision=self.precision,
            accelerator=self.accelerator,
            nodes=self.world if self.shared_gpu else 1,
            shared_gpu=self.shared_gpu,
            extra={"exclude_frozen_parameters": self.exclude_frozen},
        )


LAYOUTS = [
    Layout(world, ep, stage)
    for world in (1, 2, 4)
    for ep in (1, 2, 4)
    if world % ep == 0
    for stage in (1, 2, 3)
]


class Divided(Resumed):
    """A global batch that is divided over however many ranks there are."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "lambda")
        for name in FROZEN:
            self.net.get_parameter(name).requires_grad_(False)

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(11 + self.trainer.current_epoch)
        batch = torch.randn(GLOBAL_BATCH, TOKENS, D_IN, generator=generator)
        own = batch.chunk(self.case.world)[self.trainer.global_rank]
        return DataLoader(RankBatches(own[None]), batch_size=None)


class WithModules(Divided):
    """The same with experts that are modules; what a rank doesn't hold has other shapes."""

    def __init__(self, case: Case, experts: str) -> None:
        super().__init__(case)
        self.experts = experts
        self.net = None if case.stage == 3 else self.build()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()

    def build(self) -> nn.ModuleDict:
        net = build_modules(self.experts)
        for name, parameter in net.named_parameters():
            if name.endswith(MODULES_FROZEN):
                parameter.requires_grad_(False)
        return net


class Norms(pl.Callback):
    """Notes the gradient norm of each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))


class SaveAt(pl.Callback):
    """Saves when an epoch ends, or before the first step."""

    def __init__(self, path: str, step: int | None) -> None:
        self.path, self.step = path, step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.step is None:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@dataclass
class Steps:
    """Losses of this rank's share and norms of the whole gradient, step by step."""

    losses: list[float]
    norms: list[float]


def _fit(layout: Layout, saver: SaveAt, seed: int, path: str | None) -> Steps:
    pl.seed_everything(seed, verbose=False)
    module, tracer = layout.module(), Norms()
    trainer = trainer_for(layout.case(), STEPS, callbacks=[tracer, saver])
    trainer.fit(module, ckpt_path=path)
    return Steps(module.batch_losses, tracer.norms)


def straight(layout: Layout, path: str) -> Steps:
    """All steps; saves after the first ones."""
    return _fit(layout, SaveAt(path, SAVED), 7, None)


def resumed(layout: Layout, path: str, again: str) -> Steps:
    """Loads, saves what was loaded at once, and takes the remaining steps."""
    assert Path(path).is_dir()
    return _fit(layout, SaveAt(again, None), 8, path)


def straight_all(layouts: list[Layout], paths: list[str]) -> list[Steps]:
    """:func:`straight` for several layouts of as many ranks."""
    return [straight(layout, path) for layout, path in zip(layouts, paths, strict=True)]
