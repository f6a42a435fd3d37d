"""Schedulers, weight decay, frozen parameters: as in plain PyTorch, for experts and the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger
from strategy.exactness import assert_close
from strategy.models import Case, Net, build_net, loss_of, make_batches
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

STEPS = 5
RATES = (1e-2, 3e-2)
DECAY = 0.5


def make_optimizer(net: nn.Module, trainable_only: bool = False) -> Optimizer:
    """Experts and dense parameters together in each of two groups, as users write them."""
    parameters = [p for p in net.named_parameters() if p[1].requires_grad or not trainable_only]
    plain = [p for name, p in parameters if "bias" in name or "norm" in name]
    decayed = [p for name, p in parameters if not ("bias" in name or "norm" in name)]
    groups = [
        {"params": decayed, "weight_decay": DECAY, "lr": RATES[0]},
        {"params": plain, "weight_decay": 0.0, "lr": RATES[1]},
    ]
    return torch.optim.AdamW(groups, eps=1e-3)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda _: None,
    "lambda": lambda o: schedules.LambdaLR(o, [lambda s: 1 / (1 + s), lambda s: 1 / (2 + s)]),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=STEPS),
    "one-cycle": lambda o: schedules.OneCycleLR(o, max_lr=list(RATES), total_steps=STEPS + 1),
    "sequential": lambda o: schedules.SequentialLR(
        o,
        [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, T_max=3)],
        milestones=[2],
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.3, patience=0),
}


@dataclass
class Trained:
    """What a run did: for each step, (weight decay, lr, betas) of each group, then the end."""

    groups: list[list[tuple[float, float, tuple[float, float]]]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    logged: set[str] = field(default_factory=set)
    moe: list[bool] = field(default_factory=list)


def note(groups: list[dict[str, Any]]) -> list[tuple[float, float, tuple[float, float]]]:
    """The hyperparameters of ``optimizer.param_groups``."""
    return [(g["weight_decay"], float(g["lr"]), tuple(g["betas"])) for g in groups]


def freeze(net: nn.ModuleDict, frozen: str) -> None:
    """Switches gradients off for a part of the network."""
    for name, parameter in net.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)


class Scheduled(Net):
    """Trains with any of the schedulers."""

    def __init__(
        self, case: Case, scheduler: str, frozen: str = "", trainable_only: bool = False
    ) -> None:
        super().__init__(case)
        self.scheduler, self.trainable_only = scheduler, trainable_only
        freeze(self.net, frozen)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("plateau", torch.ones(()))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net, self.trainable_only)
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        if scheduler is None:
            return optimizer
        schedule = {"scheduler": scheduler, "interval": "step", "monitor": "plateau"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Notes(pl.Callback):
    """Notes the groups that each step used; may set a learning rate by hand."""

    def __init__(self, by_hand: dict[int, float]) -> None:
        self.by_hand = by_hand
        self.trained = Trained()

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in self.by_hand:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = self.by_hand[trainer.global_step]

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        groups = trainer.strategy.deepspeed_engine.optimizer.optimizer.param_groups
        self.trained.groups.append(note(groups))
        self.trained.moe = [bool(group.get("moe")) for group in groups]


class Memory(Logger):
    """Keeps the names that were logged."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.names |= metrics.keys()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""


def fit(
    case: Case,
    scheduler: str,
    by_hand: dict[int, float] | None = None,
    frozen: str = "",
    trainable_only: bool = False,
) -> Trained:
    """Trains under FastMoEStrategy."""
    pl.seed_everything(7, verbose=False)
    module = Scheduled(case, scheduler, frozen, trainable_only)
    notes, logger = Notes(by_hand or {}), Memory()
    callbacks = [notes, LearningRateMonitor("step")]
    trainer = make_trainer(
        case, callbacks=callbacks, logger=logger, log_every_n_steps=1, gradient_clip_val=None
    )
    trainer.fit(module)
    notes.trained.weights = whole_weights(module.net)
    notes.trained.logged = {name for name in logger.names if name.startswith("lr-")}
    return notes.trained


def twin(
    case: Case, scheduler: str, by_hand: dict[int, float] | None = None, frozen: str = ""
) -> Trained:
    """The same in one process, in plain PyTorch."""
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    freeze(net, frozen)
    optimizer = make_optimizer(net)
    schedule = SCHEDULERS[scheduler](optimizer)
    trained = Trained()
    for i, step in enumerate(make_batches(case)):
        for group in optimizer.param_groups if i in (by_hand or {}) else []:
            group["lr"] = by_hand[i]
        optimizer.zero_grad()
        chunks = [b for micro in step for b in micro]
        for chunk in chunks:
            (loss_of(net, chunk) / len(chunks)).backward()
        trained.groups.append(note(optimizer.param_groups))
        optimizer.step()
        if scheduler == "plateau":
            schedule.step(1.0)
        elif schedule is not None:
            schedule.step()
    trained.weights = {n: p.detach() for n, p in net.named_parameters()}
    return trained


def plain_monitor(scheduler: str) -> set[str]:
    """The names that LearningRateMonitor logs without any strategy."""
    case = Case(steps=1)
    logger = Memory()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        callbacks=[LearningRateMonitor("step")],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Scheduled(case, scheduler))
    return {name for name in logger.names if name.startswith("lr-")}


CASE = Case(world=2, ep=2, steps=STEPS)


def assert_weights(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert_close(actual[name], weight, name)


def assert_groups(trained: Trained, plain: Trained) -> None:
    """Each of the two groups is split in two, which go through its hyperparameters."""
    assert trained.moe == [False, True, False, True]
    assert len(trained.groups) == len(plain.groups) == STEPS
    for own, twin in zip(trained.groups, plain.groups, strict=True):
        assert own == [twin[0], twin[0], twin[1], twin[1]]


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "none"])
@pytest.mark.parametrize("stage", [2, 3])
def test_schedulers_act_as_in_plain_pytorch(rank_pool, stage, scheduler):
    case = replace(CASE, stage=stage, coefficients=(0.0, 0.0))
    plain = twin(case, scheduler)
    assert len({tuple(step) for step in plain.groups}) >= 4, "the scheduler must do something"
    for trained in rank_pool.run(fit, 2, case, scheduler):
        assert_groups(trained, plain)
        assert_weights(trained.weights, plain.weights)


@pytest.mark.parametrize("scheduler", ["none", "lambda", "one-cycle", "plateau"])
def test_the_monitor_logs_the_names_that_a_plain_optimizer_has(rank_pool, scheduler):
    names = plain_monitor(scheduler)
    assert names >= {"lr-AdamW/pg1", "lr-AdamW/pg2"}
    assert rank_pool.run(fit, 2, CASE, scheduler)[0].logged == names


@pytest.mark.parametrize("scheduler", ["none", "plateau"])
def test_a_rate_set_by_hand_stands(rank_pool, scheduler):
    # The plateau scheduler's first change comes after the second step.
    case = replace(CASE, coefficients=(0.0, 0.0), steps=2 if scheduler == "plateau" else 5)
    by_hand = {1: 0.07}
    plain = twin(case, scheduler, by_hand)
    assert [rate for _, rate, _ in plain.groups[1]] == [0.07, 0.07]
    for trained in rank_pool.run(fit, 2, case, scheduler, by_hand):
        rates = [[rate for _, rate, _ in step] for step in trained.groups]
        assert rates == [[step[0][1]] * 2 + [step[1][1]] * 2 for step in plain.groups]
        assert_weights(trained.weights, plain.weights)


@pytest.mark.parametrize(
    ("stage", "frozen", "trainable_only"),
    [
        (1, "moes.0.experts", False),
        (2, "moes.0.experts", True),
        (2, "moes.1.router", False),
        (2, "experts", False),
        (2, "up_", True),
        (3, "moes.0.experts", False),
        (3, "experts", True),
        (3, "router", False),
        (3, "up_", False),
    ],
)
def test_frozen_parameters_stay_and_the_rest_trains(rank_pool, stage, frozen, trainable_only):
    case = replace(CASE, stage=stage, coefficients=(0.0, 0.0))
    plain = twin(case, "none", frozen=frozen)
    start = twin(replace(case, steps=0), "none").weights
    for trained in rank_pool.run(fit, 2, case, "none", None, frozen, trainable_only):
        assert_weights(trained.weights, plain.weights)
        for name, weight in trained.weights.items():
            assert torch.equal(weight, start[name]) == (frozen in name), name


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_the_optimizer_changes_no_weight(rank_pool, stage):
    case = replace(CASE, stage=stage)
    offloaded = replace(case, extra={"offload_optimizer": True})
    here = rank_pool.run(fit, 2, case, "lambda")
    there = rank_pool.run(fit, 2, offloaded, "lambda")
    for own, twin in zip(there, here, strict=True):
        assert own.groups == twin.groups
        assert_weights(own.weights, twin.weights)
