"""What the ranks run in test_clipping.py."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from strategy.models import Case, Net, loss_of
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.errors import ParameterGroupError

NORM = 0.05


class Asking(Net):
    """Asks for clipping by hand, or changes the Trainer's value.

    Args:
        case: its sizes.
        way: "manual" optimization, "by hand" before the step, or the "trainer"'s.
    """

    def __init__(self, case: Case, way: str) -> None:
        super().__init__(case)
        self.way, self.weights = way, {}
        self.automatic_optimization = way != "manual"

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.way != "manual":
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        self.clip_gradients(optimizer, gradient_clip_val=NORM)
        optimizer.step()
        self.lr_schedulers().step()
        return None

    def on_train_start(self) -> None:
        if self.way == "trainer":
            self.trainer.gradient_clip_val = NORM

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.way == "by hand":
            self.clip_gradients(optimizer, gradient_clip_val=NORM, gradient_clip_algorithm="norm")

    def on_train_end(self) -> None:
        self.weights = whole_weights(self.net)


def asked(case: Case, way: str) -> dict[str, Tensor]:
    """The weights after a training that is clipped in some way."""
    pl.seed_everything(7, verbose=False)
    module = Asking(case, way)
    before = 1e9 if way == "trainer" else None
    make_trainer(case, gradient_clip_val=before).fit(module)
    return module.weights


def configured(case: Case, norm: float, of_trainer: float | None) -> dict[str, Tensor]:
    """The weights after a training whose DeepSpeed config has a norm."""
    pl.seed_everything(7, verbose=False)
    module = Asking(case, "")
    config = {
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": norm,
    }
    strategy = FastMoEStrategy(expert_parallel_size=case.ep, config=config)
    make_trainer(case, gradient_clip_val=of_trainer, strategy=strategy).fit(module)
    return module.weights


class Differing(Asking):
    """Rank 1 asks for another norm at its third step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 2 and self.trainer.global_rank == 1:
            self.trainer.gradient_clip_val = 2 * NORM


def differing(case: Case) -> tuple[str, int]:
    """The error of ranks that clip differently, and the steps that were taken before."""
    pl.seed_everything(7, verbose=False)
    trainer = make_trainer(case, gradient_clip_val=NORM)
    try:
        trainer.fit(Differing(case, ""))
    except ParameterGroupError as error:
        return str(error), trainer.global_step
    return "", trainer.global_step
