"""What the ranks run in test_resume.py."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.models import Case, Net, RankBatches, loss_of, make_batches, make_optimizer
from strategy.tracing import Tracer, make_trainer, whole_weights
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fastmoe.errors import FastMoEError

STEPS, FIRST = 6, 3


class Resumed(Net):
    """One optimizer step per epoch, so that any epoch's end is a point to resume from."""

    def __init__(self, case: Case, scheduler: str) -> None:
        super().__init__(case)
        self.scheduler = scheduler
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        self.loaded: Any = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps_seen += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch), sync_dist=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net, kind=self.case.optimizer)
        if self.scheduler == "lambda":
            schedule: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer, [lambda s: 1.0 / (1 + s), lambda s: 0.5 / (1 + s)]
            )
        else:  # computes each rate from the one before, which it reads back from the group
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def train_dataloader(self) -> DataLoader[Tensor]:
        step = make_batches(self.case)[self.trainer.current_epoch, :, self.trainer.global_rank]
        return DataLoader(RankBatches(step), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        batches = make_batches(self.case)[0, 0, self.trainer.global_rank]
        return DataLoader(RankBatches(batches[None]), batch_size=None)


class Rates(Tracer):
    """Also notes the learning rates that the optimizer used, and the weights at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[list[float]] = []
        self.start: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = whole_weights(pl_module.net)

        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            engine = trainer.strategy.deepspeed_engine
            self.rates.append([group["lr"] for group in engine.optimizer.optimizer.param_groups])
            self.trace.norms.append(float(engine.get_global_grad_norm()))
            self.trace.weights.append(whole_weights(pl_module.net))


@dataclass
class Run:
    """What one fit did on this rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    steps_seen: int = 0


def trainer_for(case: Case, epochs: int, **kwargs: Any) -> pl.Trainer:
    """A Trainer that loads its data anew each epoch."""
    defaults = {
        "max_steps": -1,
        "max_epochs": epochs,
        "reload_dataloaders_every_n_epochs": 1,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    return make_trainer(case, **{**defaults, **kwargs})


def fit(
    case: Case, scheduler: str, epochs: int, seed: int, directory: str | None, path: str | None
) -> Run:
    """Trains up to ``epochs``; saves ``last.ckpt`` after each into ``directory``."""
    pl.seed_everything(seed, verbose=False)
    module, tracer = Resumed(case, scheduler), Rates()
    callbacks: list[pl.Callback] = [tracer]
    if directory is not None:
        callbacks.append(ModelCheckpoint(directory, save_last=True, save_top_k=0, every_n_epochs=1))
    trainer = trainer_for(
        case, epochs, callbacks=callbacks, enable_checkpointing=directory is not None
    )
    trainer.fit(module, ckpt_path=path)
    trace = tracer.trace
    return Run(
        module.batch_losses,
        trace.norms,
        tracer.rates,
        tracer.start,
        trace.weights,
        int(module.steps_seen),
    )


def straight_and_resumed(case: Case, scheduler: str, directory: str) -> tuple[Run, Run, Run]:
    """(all steps at once, the first steps, the rest in a new Trainer and a new model)."""
    last = str(Path(directory) / "last.ckpt")
    return (
        fit(case, scheduler, STEPS, 7, None, None),
        fit(case, scheduler, FIRST, 7, directory, None),
        fit(case, scheduler, STEPS, 8, None, last),
    )


def validate(case: Case, path: str) -> float:
    """The validation loss of the model in a checkpoint; this one starts from other weights."""
    pl.seed_everything(9, verbose=False)
    trainer = trainer_for(case, 1, limit_val_batches=1.0)
    (logged,) = trainer.validate(Resumed(case, "cosine"), ckpt_path=path, verbose=False)
    return logged["val_loss"]


def save_and_validate(case: Case, directory: str) -> float:
    """Trains, saves, and validates the checkpoint in a new Trainer."""
    fit(case, "cosine", FIRST, 7, directory, None)
    return validate(case, str(Path(directory) / "last.ckpt"))


def error_of(function: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """The type and the message of the package's error that ``function`` raises."""
    try:
        function(*args, **kwargs)
    except FastMoEError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def save(case: Case, directory: str) -> None:
    """One epoch, and ``last.ckpt``."""
    fit(case, "cosine", 1, 7, directory, None)


def resume(case: Case, path: str) -> tuple[str, str]:
    """The error that this rank gets when it resumes."""
    return error_of(fit, case, "cosine", STEPS, 7, None, path)


def resume_all(case: Case, paths: list[str]) -> list[tuple[str, str]]:
    """The errors that this rank gets, path by path."""
    return [resume(case, path) for path in paths]


class WithObject(Resumed):
    """Puts something into the checkpoint that is not plain data."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["third"] = Fraction(1, 3)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["third"]


def not_plain_data(case: Case, directory: str) -> tuple[list[str], tuple[str, str], list[Any]]:
    """(warnings of saving, the error by default, what is loaded once allowed, or trusted)."""
    path = str(Path(directory) / "object.ckpt")
    trainer = trainer_for(case, 1)
    trainer.fit(WithObject(case, "cosine"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.save_checkpoint(path)
    said = [str(warning.message) for warning in caught]
    error = error_of(trainer_for(case, 2).fit, WithObject(case, "cosine"), ckpt_path=path)
    module = WithObject(case, "cosine")
    with torch.serialization.safe_globals([Fraction]):
        trainer_for(case, 2).fit(module, ckpt_path=path)
    trusting = WithObject(case, "cosine")
    trusted = replace(case, extra={"trust_checkpoints": True})
    trainer_for(trusted, 2).fit(trusting, ckpt_path=path)
    return said, error, [module.loaded, trusting.loaded]


def weights_only(case: Case, directory: str) -> tuple[float, float, tuple[str, str]]:
    """(validation loss from a full checkpoint, from one of weights, the error of resuming)."""
    full, light = (str(Path(directory) / name) for name in ("full.ckpt", "light.ckpt"))
    trainer = trainer_for(case, 2)
    pl.seed_everything(7, verbose=False)
    trainer.fit(Resumed(case, "cosine"))
    trainer.save_checkpoint(full)
    trainer.save_checkpoint(light, weights_only=True)
    return validate(case, full), validate(case, light), resume(case, light)


class OtherWidth(Resumed):
    """One more parameter than the checkpoint has."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "cosine")
        self.net["more"] = torch.nn.Linear(3, 3)


def other_model(case: Case, directory: str) -> tuple[str, str]:
    """The error of resuming with a model of other parameters."""
    save(case, directory)
    path = str(Path(directory) / "last.ckpt")
    return error_of(trainer_for(case, 2).fit, OtherWidth(case), ckpt_path=path)


def save_into(case: Case, directory: str) -> tuple[str, str]:
    """The error of saving into a directory that holds other things."""
    trainer = trainer_for(case, 1)
    trainer.fit(Resumed(case, "cosine"))
    return error_of(trainer.save_checkpoint, directory)


class Factored(torch.optim.SGD):
    """Keeps a state that belongs to a whole partition: neither one value nor one per element."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["row"] = torch.zeros(3)
        return super().step(closure)


class WithFactored(Resumed):
    def configure_optimizers(self) -> Any:
        return Factored(self.net.parameters(), lr=0.1)


def factored_states(case: Case, path: str) -> tuple[str, str]:
    """The error of saving them."""
    trainer = trainer_for(case, 1)
    trainer.fit(WithFactored(case, "cosine"))
    return error_of(trainer.save_checkpoint, path)


class Lenient(OtherWidth):
    """Takes what matches."""

    strict_loading = False
    seen: dict[str, Tensor]

    def on_train_start(self) -> None:
        self.seen = whole_weights(self.net)


def not_strict(case: Case, directory: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """(weights that were saved, weights after loading into a larger model, steps it trained)."""
    saved = fit(case, "cosine", 1, 7, directory, None).weights[-1]
    pl.seed_everything(8, verbose=False)
    module = Lenient(case)
    own = {f"more.{n}": p.detach().clone() for n, p in module.net["more"].named_parameters()}
    trainer_for(case, 2).fit(module, ckpt_path=str(Path(directory) / "last.ckpt"))
    return {**saved, **own}, module.seen, len(module.batch_losses)
