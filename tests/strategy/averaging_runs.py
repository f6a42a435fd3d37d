"""What the ranks run in test_averaging.py: Lightning's WeightAveraging under the strategy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from strategy.models import Case
from strategy.resume_runs import Resumed, error_of, trainer_for
from strategy.tracing import whole_weights
from torch import Tensor, nn

Weights = dict[str, Tensor]
DECAY = 0.6


class Counting(Resumed):
    """Has a buffer and a parameter that is in no optimizer; both count steps."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "lambda")
        self.register_buffer("progress", torch.zeros(2))
        self.loose = nn.Parameter(torch.zeros(3), requires_grad=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.progress += 1
        with self.trainer.strategy.edit_parameters([self.loose]), torch.no_grad():
            self.loose += 1

    def counts(self) -> tuple[float, float]:
        """Of the buffer and the parameter."""
        partitioned = [self.loose] if hasattr(self.loose, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            return float(self.progress[0]), float(self.loose[0])


@dataclass
class Averaged:
    """What a run saw.

    Attributes:
        trained: weights after each step, before the callbacks that come after the first.
        validated: weights in the validation of each epoch.
        restored: weights at the end of each validation, before saving.
        end: weights at the end of training.
        start: weights at the start.
        warned: what was said of averages.
        counts: of buffer and loose parameter, in validation and after it, of each epoch.
    """

    trained: list[Weights] = field(default_factory=list)
    validated: list[Weights] = field(default_factory=list)
    restored: list[Weights] = field(default_factory=list)
    end: Weights = field(default_factory=dict)
    start: Weights = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    counts: list[tuple[float, ...]] = field(default_factory=list)


class Look(pl.Callback):
    def __init__(self, seen: Averaged) -> None:
        self.seen = seen
        self.in_validation: tuple[float, ...] = ()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.start = whole_weights(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.trained.append(whole_weights(pl_module.net))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            with torch.inference_mode(False):
                self.seen.validated.append(whole_weights(pl_module.net))
                self.in_validation = pl_module.counts()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            with torch.inference_mode(False):
                self.seen.restored.append(whole_weights(pl_module.net))
                self.seen.counts.append((*self.in_validation, *pl_module.counts()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # The order of callbacks: this one comes after the average.
        self.seen.end = whole_weights(pl_module.net)


def averaging(kind: str) -> list[pl.Callback]:
    return {
        "none": list,
        "ema": lambda: [EMAWeightAveraging(decay=DECAY)],
        "swa": lambda: [WeightAveraging(use_buffers=False)],
        "on the cpu": lambda: [EMAWeightAveraging(device="cpu", decay=DECAY)],
    }[kind]()


def fit(
    case: Case,
    kind: str,
    epochs: int,
    directory: str | None = None,
    path: str | None = None,
    seed: int = 7,
) -> Averaged:
    """Trains with validation after each epoch of one step, and saves after each."""
    pl.seed_everything(seed, verbose=False)
    seen = Averaged()
    callbacks = [*averaging(kind), Look(seen)]
    if directory is not None:
        callbacks.append(ModelCheckpoint(directory, filename="{step}", save_top_k=-1))
    trainer = trainer_for(
        case,
        epochs,
        callbacks=callbacks,
        enable_checkpointing=directory is not None,
        limit_val_batches=1.0,
        num_sanity_val_steps=1,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Counting(case), ckpt_path=path)
    seen.warned = [
        text for w in caught if " with" in (text := str(w.message)) and "Averaging" in text
    ]
    return seen


def evaluated(case: Case, path: str) -> Weights:
    """The weights with which a checkpoint is validated, by a Trainer without the callback."""
    seen = Averaged()
    trainer = trainer_for(case, 1, callbacks=[Look(seen)], limit_val_batches=1.0)
    trainer.validate(Counting(case), ckpt_path=path, verbose=False)
    return seen.validated[0]


class OwnSwap(WeightAveraging):
    def _swap_models(self, pl_module: Any) -> None: ...


def _by_norm(average: Tensor, current: Tensor, _: Any) -> Tensor:
    return average + (current - average) / (1 + current.norm())


def refused(case: Case) -> list[Any]:
    """What each refused callback says."""
    callbacks: list[list[pl.Callback]] = [
        [OwnSwap()],
        [WeightAveraging(avg_fn=_by_norm)],
        [WeightAveraging(), EMAWeightAveraging()],
    ]
    return [
        error_of(trainer_for(case, 1, callbacks=group).fit, Counting(case)) for group in callbacks
    ]
