"""Training and evaluating the example language model from the command line, with LightningCLI.

``lightning-fastmoe fit --config examples/tiny_lm.yaml`` runs a configuration file. Every value in
it can be overridden (``--model.num_experts 16``); ``lightning-fastmoe fit --help`` lists them all.
A configuration whose ``model`` and ``data`` name a ``class_path`` trains those classes instead, as
``examples/pretrain_lm.yaml`` does.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.utilities import rank_zero_warn
from typing_extensions import override

from lightning_fastmoe.argument_types import suggestion
from lightning_fastmoe.demos.byte_lm.classes import names_a_class
from lightning_fastmoe.demos.byte_lm.data import ByteCorpus
from lightning_fastmoe.demos.byte_lm.model import MoELanguageModel
from lightning_fastmoe.errors import ConfigError, FastMoEError

_CHATTER = (
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "LOCAL_RANK:",
    "Enabling DeepSpeed",
    "Seed set to",
    "initializing deepspeed distributed",
    "Loading `train_dataloader` to estimate",
    "You are using a CUDA device",
    "\N{ELECTRIC LIGHT BULB} Tip:",
)
"""Prefixes of lines that Lightning logs at every start and that don't concern this run."""

_CHATTERING_LOGGERS = (
    "pytorch_lightning.accelerators.cuda",
    "lightning_fabric.utilities.rank_zero",
    "lightning_fabric.utilities.seed",
    "pytorch_lightning.strategies.deepspeed",
    "pytorch_lightning.utilities.rank_zero",
)

_UPSTREAM = r"(deepspeed|jsonargparse|lightning_fabric|pydantic|pytorch_lightning|torch)(\.|$)"


@dataclass(frozen=True)
class AutoSettings:
    """Values for the Trainer's "auto" settings, so that one configuration works on every machine.

    Args:
        cpu_devices: number of processes for `trainer.devices: auto` on a machine without a GPU.
        gpu_precision: the precision on GPUs if `trainer.precision` isn't given.
    """

    cpu_devices: int = 1
    gpu_precision: str = "bf16-mixed"


class FastMoECLI(LightningCLI):
    """LightningCLI with the settings of :class:`AutoSettings`."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(AutoSettings, "auto")

    @override
    def before_instantiate_classes(self) -> None:
        if not gc.isenabled():  # the command's process has imported its packages, undisturbed
            keep_imports()
        config = self.config[self.subcommand]
        resolve_auto(config.trainer, config.auto, torch.cuda.is_available())

    @override
    def instantiate_classes(self) -> None:
        check_strategy(self.config[self.subcommand].trainer.strategy)
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            # jsonargparse takes a constructor's ValueError for a value of the wrong type.
            if (reason := own_error(error)) is None:
                raise
            raise reason from error

    def after_fit(self) -> None:
        """Says where checkpoints are; LightningCLI calls this at the end of training."""
        trainer: Trainer = self.trainer
        for callback in trainer.checkpoint_callbacks:
            if trainer.is_global_zero and (path := saved_checkpoint(callback)):
                print(f"Checkpoint: {path}")

    def before_validate(self) -> None:
        """Says that weights are untrained; LightningCLI calls this before it validates."""
        given = self.config[self.subcommand].ckpt_path
        if given is None and getattr(self.model, "_weights", None) is None:
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path: the model has its initial weights, unless"
                " it loads others itself. --ckpt_path last takes the latest checkpoint's."
            )

    before_test = before_validate

    def before_predict(self) -> None:
        """Says that nothing keeps the predictions, too."""
        FastMoECLI.before_validate(self)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            rank_zero_warn(
                "predict writes nothing by itself. Unless the model does, add a subclass of"
                " pytorch_lightning.callbacks.BasePredictionWriter to trainer.callbacks."
            )


def check_strategy(given: Any) -> None:
    """Refuses a name of a strategy that doesn't exist.

    Raises:
        ConfigError: with the names of this package's.
    """
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(given, str) and given.lower() not in known:
        own = [name for name in known if name.startswith("fastmoe")]
        raise ConfigError(
            f"trainer.strategy: there is no {given!r}.{suggestion(given, known)} This package's"
            f" are {', '.join(own)}, and the class lightning_fastmoe.FastMoEStrategy."
        )


def saved_checkpoint(callback: Any) -> Path | None:
    """The last checkpoint of a callback, else its best, below the current folder where it is."""
    paths = (getattr(callback, name, "") for name in ("last_model_path", "best_model_path"))
    if (found := next((Path(path) for path in paths if path), None)) is None:
        return None
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found


def keep_imports() -> None:
    """Starts garbage collection, and exempts what exists now: modules, classes and functions.

    Collections of the oldest generation would traverse all of it, during training and several times
    when the process ends. What is created from now on is collected as ever.
    """
    gc.freeze()
    gc.enable()


def own_error(error: BaseException) -> FastMoEError | None:
    """The package's error that led to ``error``, None if there is none.

    jsonargparse keeps only the text of what a class raised that stands for one of several types.
    """
    text = str(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FastMoEError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return cause
    reasons = re.findall(r"^  - (?!Expected an? )(.+)$", text, re.MULTILINE)
    return ConfigError(" ".join(dict.fromkeys(reasons))) if reasons else None


def resolve_auto(trainer: Any, auto: Any, has_cuda: bool) -> None:
    """Replaces the Trainer's "auto" values by values for this machine.

    Args:
        trainer: the Trainer's arguments, as attributes; changed in place.
        auto: an :class:`AutoSettings`, or an object with its attributes.
        has_cuda: whether there is a CUDA device.
    """
    if trainer.accelerator == "auto":
        trainer.accelerator = "cuda" if has_cuda else "cpu"
    if trainer.accelerator == "cpu":
        if trainer.devices == "auto":
            trainer.devices = auto.cpu_devices
    elif trainer.precision is None:
        trainer.precision = auto.gpu_precision


def silence_upstream() -> None:
    """Hides dependencies' messages about themselves; warnings about the run stay visible."""
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_UPSTREAM)
    for message in (
        # The corpus is in memory, where worker processes only cost time.
        ".*does not have many workers",
        # FastMoEStrategy handles uneven data, so that each sample counts once.
        "Using `DistributedSampler` with the dataloaders",
        # DeepSpeed's, at start.
        r"barrier\(\): using the device under current context",
        # Resumed runs continue in the folder they started in.
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    for name in _CHATTERING_LOGGERS:
        logging.getLogger(name).addFilter(_is_about_the_run)


def _is_about_the_run(record: logging.LogRecord) -> bool:
    message = record.getMessage().removeprefix(f"[rank: {os.environ.get('LOCAL_RANK', 0)}] ")
    return not message.startswith(_CHATTER)


def _is_of_what_was_asked_for(error: BaseException) -> bool:
    """Whether Lightning refuses what the user has asked for, or a path of the user's is in use.

    Lightning raises a ValueError for some of that, which may also come from anywhere else.
    """
    if isinstance(error, ValueError):
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
        return where.partition(".")[0] in ("pytorch_lightning", "lightning_fabric")
    paths = (MisconfigurationException, FileExistsError, NotADirectoryError, PermissionError)
    return isinstance(error, paths)


def run(args: Sequence[str] | None = None) -> None:
    """Runs fit, validate, test or predict.

    Args:
        args: the arguments; the process's own by default.

    Raises:
        FastMoEError: for errors that the user can fix, Lightning's own among them.
    """
    silence_upstream()
    try:
        import jsonargparse  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "training from the command line needs jsonargparse:"
            " pip install 'lightning-fastmoe[cli]'"
        ) from None
    from lightning_fastmoe.demos.byte_lm.parser import OneLineParser

    words = sys.argv[1:] if args is None else list(args)
    own = names_a_class(words)
    try:
        FastMoECLI(
            LightningModule if own else MoELanguageModel,
            LightningDataModule if own else ByteCorpus,
            subclass_mode_model=own,
            subclass_mode_data=own,
            # A resumed run writes into the same folder.
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=OneLineParser,
            args=None if args is None else words,
        )
    except (MisconfigurationException, ValueError, OSError) as error:
        if not _is_of_what_was_asked_for(error):
            raise
        raise ConfigError(str(error)) from error
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # otherwise NCCL warns at exit
