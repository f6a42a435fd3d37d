"""What the ranks run in test_loading.py: fine-tuning a model that is read from its files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import transformers
from huggingface.sharding_runs import EpochPerStep, Run, Tuned, WeightsByEpoch
from strategy.tracing import Tracer, make_trainer

from lightning_fastmoe.errors import ConfigError, FastMoEError
from lightning_fastmoe.huggingface import from_pretrained, save_pretrained, saving
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.placement import Placement, expert_placement


class FromFiles(Tuned):
    """Reads the whole model in ``__init__``, or only own experts in ``configure_model``."""

    def __init__(self, run: Run, folder: Path, own: bool) -> None:
        super().__init__(run)
        self.folder, self.own = folder, own
        self.net = None
        self.built: list[int] = []
        if not own:
            self.net = transformers.AutoModelForCausalLM.from_pretrained(
                folder, experts_implementation="fastmoe"
            )

    def configure_model(self) -> None:
        if self.net is None:
            self.net = from_pretrained(self.folder)
            self.built = [layer.num_local_experts for _, layer in expert_layers(self.net)]


def finetunes(run: Run, folder: Path, own: bool) -> Any:
    """Losses, this rank's last weights, and how many experts it had before the strategy's turn."""
    module, tracer = FromFiles(run, folder, own), Tracer()
    make_trainer(run, callbacks=[tracer]).fit(module)
    return module.losses, tracer.trace.weights[-1], module.built


class EpochFromFiles(EpochPerStep):
    """Reads its own experts only; one optimizer step per epoch, to resume on other ranks."""

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(replace(run, in_configure_model=True))
        self.folder = folder

    def configure_model(self) -> None:
        if self.net is None:
            self.net = from_pretrained(self.folder)


def finetunes_epochs(
    run: Run, folder: Path, epochs: int, save_to: Path, resume_from: Path | None = None
) -> Any:
    """Trains up to so many steps and saves; the whole weights after each."""
    tracer = WeightsByEpoch()
    options = {"max_steps": -1, "max_epochs": epochs, "reload_dataloaders_every_n_epochs": 1}
    trainer = make_trainer(run, callbacks=[tracer], **options)
    trainer.fit(EpochFromFiles(run, folder), ckpt_path=resume_from)
    trainer.save_checkpoint(save_to)
    return tracer.weights


def saves(run: Run, folder: Path, background: bool = False) -> Any:
    """Trains, writes a checkpoint and files for transformers, and returns the whole last weights.

    In the background, the files are written by a callback while training goes on.
    """
    if background:
        run = replace(run, extra={"async_checkpoint": True})
    module, tracer = Tuned(run), Tracer()
    callbacks = [tracer, SavesAtEnd(folder / "model")] if background else [tracer]
    trainer = make_trainer(run, callbacks=callbacks)
    trainer.fit(module)
    trainer.save_checkpoint(folder / "tuned.ckpt")
    if not background:
        save_pretrained(trainer, folder / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "save", None)  # refused before anything is written
            with pytest.raises(ConfigError, match="exists already"):
                save_pretrained(trainer, folder / "model")
    return {name.removeprefix("net."): w for name, w in tracer.trace.weights[-1].items()}


def saves_what_was_read(run: Run, folder: Path, to: Path) -> Any:
    """Trains what is read from files and writes it; the whole last weights, and the buffers.

    Before that, rank 0 alone fails to write: each rank's error is returned, too.
    """
    module, tracer = FromFiles(run, folder, own=True), Tracer()
    trainer = make_trainer(run, callbacks=[tracer])
    trainer.fit(module)
    trainer.save_checkpoint(to / "tuned.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "export_in_place", _full_disk)
        with pytest.raises(ConfigError) as error:
            save_pretrained(trainer, to / "model")
    save_pretrained(trainer, to / "model")
    weights = {name.removeprefix("net."): w for name, w in tracer.trace.weights[-1].items()}
    return weights, {name: b.clone() for name, b in module.net.named_buffers()}, str(error.value)


class Classifier(FromFiles):
    """Trains another head than the files have."""

    def __init__(self, run: Run, folder: Path, head: str) -> None:
        super().__init__(run, folder, own=True)
        self.head = head

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(3)
            auto = getattr(transformers, self.head)
            self.net = auto.from_pretrained(self.folder, experts_implementation="fastmoe")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(input_ids=batch["input_ids"])[0].square().mean()

    validation_step = training_step


def saves_another_class(run: Run, folder: Path, head: str, to: Path) -> dict[str, torch.Tensor]:
    """Trains a model that is not of the class in the files' config, and writes it; its weights."""
    module, tracer = Classifier(run, folder, head), Tracer()
    trainer = make_trainer(run, callbacks=[tracer])
    trainer.fit(module)
    save_pretrained(trainer, to)
    return {name.removeprefix("net."): w for name, w in tracer.trace.weights[-1].items()}


def _full_disk(*args: Any, **options: Any) -> None:
    raise OSError("no space left")


class SavesAtEnd(pl.Callback):
    """Writes the model at the end of the epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        save_pretrained(trainer, self.folder)


def outcome(run: Run, folder: Path) -> str:
    """The error of a run, or ""."""
    try:
        make_trainer(run).fit(FromFiles(run, folder, own=True))
    except FastMoEError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def peak_of_loading(folder: str, shards: int) -> None:
    """Prints by how many MiB the process grows while it reads its share of the experts."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # imports what it takes
        transformers.AutoModelForCausalLM.from_config(config)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kilobytes("VmRSS")
    with expert_placement(lambda n: Placement(tuple(range(n // shards)))):
        from_pretrained(folder)
    print((_kilobytes("VmHWM") - before) // 1024)


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    peak_of_loading(sys.argv[1], int(sys.argv[2]))
