"""What the ranks run in test_midway.py: saves in the middle of an epoch and of a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from strategy.expert_modules import build_modules
from strategy.models import D_IN, Case, build_net, make_optimizer, make_scheduler
from strategy.reuse_runs import Validating
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

BATCHES, EPOCHS, ACCUMULATE = 7, 2, 3
GLOBAL_BATCH, TOKENS = 4, 5


class Batches:
    """A loader that knows where it is, and that draws random numbers for every batch."""

    def __init__(self, rank: int, world: int, noise: float) -> None:
        self.rank, self.world, self.noise = rank, world, noise
        self.done = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        torch.randn(3)  # as torch's own loaders do when they begin
        return self._batches()

    def _batches(self) -> Iterator[Tensor]:
        self.done %= BATCHES
        while self.done < BATCHES:
            generator = torch.Generator().manual_seed(100 + self.done)
            batch = torch.randn(GLOBAL_BATCH, TOKENS, D_IN, generator=generator)
            own = batch.chunk(self.world)[self.rank]
            self.done += 1
            yield own + self.noise * torch.randn(own.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "rank": self.rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


@dataclass(frozen=True)
class ModuleCase(Case):
    """A run with experts that are modules: "class" or "list"."""

    experts: str = "list"


class WithDropout(pl.LightningModule):
    """Every forward pass draws random numbers, unless ``dropout`` is 0."""

    def __init__(self, case: Case, dropout: float) -> None:
        super().__init__()
        self.case, self.dropout = case, dropout
        self.net = (
            build_modules(case.experts)
            if isinstance(case, ModuleCase)
            else build_net(case.num_experts, case.coefficients)
        )
        self.batch_losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        h = nn.functional.dropout(self.net["embed"](batch), self.dropout)
        for layer in self.net["moes"]:
            h = h + nn.functional.dropout(layer(self.net["norm"](h)), self.dropout)
        target = torch.sin(3 * batch.sum(-1, keepdim=True))
        loss = (self.net["head"](h) - target).square().mean()
        self.batch_losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net, self.case.fused)
        schedule = {"scheduler": make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def train_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank, self.case.world, self.dropout)


@dataclass
class Run:
    """What one fit did on this rank; a norm is None where fp16 overflowed."""

    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Watch(pl.Callback):
    """Saves after some batches; notes norm and loss scale of each step, and the last weights."""

    def __init__(self, saves: dict[int, str]) -> None:
        self.saves, self.run = saves, Run()
        self.batches = self.steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches += 1
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            engine = trainer.strategy.deepspeed_engine
            overflowed = engine.optimizer.overflow
            self.run.norms.append(None if overflowed else float(engine.get_global_grad_norm()))
            self.run.scales.append(float(engine.optimizer.loss_scale))
        if self.batches in self.saves:
            trainer.save_checkpoint(self.saves[self.batches])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # Not after the fit, which ends with the module on the CPU.
        self.run.weights = {n: w.cpu() for n, w in whole_weights(pl_module.net).items()}


def fit(
    case: Case, dropout: float, seed: int, saves: dict[int, str], path: str | None = None
) -> Run:
    """Trains; saves after so many batches."""
    return fit_watched(case, dropout, seed, Watch(saves), path)


def fit_watched(case: Case, dropout: float, seed: int, watch: Watch, path: str | None) -> Run:
    """The same, with a callback of another kind."""
    pl.seed_everything(seed, verbose=False)
    module = WithDropout(case, dropout)
    trainer = make_trainer(case, max_epochs=EPOCHS, max_steps=-1, callbacks=[watch])
    trainer.fit(module, ckpt_path=path)
    watch.run.losses = module.batch_losses
    return watch.run


def straight_and_resumed(case: Case, saves: dict[int, str]) -> tuple[Run, dict[int, Run]]:
    """A run that saves on the way, and what comes of resuming from each of its checkpoints."""
    straight = fit(case, 0.3, 7, saves)
    return straight, {n: fit(case, 0.3, 8 + n, {}, path) for n, path in saves.items()}


def warnings_of(case: Case, path: str) -> list[str]:
    """What resuming from a checkpoint warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(case, 0.0, 8, {}, path)
    return [str(warning.message) for warning in caught]


def warnings_of_validating(case: Case, path: str) -> list[str]:
    """What validating a checkpoint warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(case).validate(Validating(case), ckpt_path=path, verbose=False)
    return [str(warning.message) for warning in caught]
