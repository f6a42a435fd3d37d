"""Refuses settings that must be identical on every rank and aren't, before ranks wait in vain.

A script that reads the environment, the host's name or files of one host can give its ranks
different settings. Some of them train without an error, but wrongly: ZeRO has each rank update its
part of the weights with its own learning rate. Most end in ranks that wait for each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    Timer,
)
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.expert_layers import ExpertLayer

_OWN_PACKAGE = __name__.partition(".")[0]
_PACKAGES = (_OWN_PACKAGE, "torch", "deepspeed", "pytorch_lightning")
# Of the strategy's own arguments: a rank may have its own time limits, say.
_OF_STRATEGY = (
    "expert_parallel_size",
    "nonfinite",
    "verify_checkpoints",
    "async_checkpoint",
    "ranks_per_node",
    "tokens_per_rank",
    "exact",
)
# What DeepSpeed logs, and where it keeps files.
_OWN_TO_RANKS = (
    "timers",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
    "nvme_path",
)
# Not `limit_train_batches` and the like: ranks may have different numbers of batches.
_OF_TRAINER = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "num_sanity_val_steps",
    "check_val_every_n_epoch",
    "val_check_interval",
    "overfit_batches",
    "log_every_n_steps",
)
_OF_LAYER = (
    "top_k",
    "capacity_factor",
    "eval_capacity_factor",
    "capacity_over",
    "drop_by",
    "loss_coefficients",
    "dispatcher_name",
    "exact",
)
_COMMUNICATING = (Checkpoint, EarlyStopping, Timer, BasePredictionWriter)
_ABSENT = "nothing"


def check_same_settings(strategy: DeepSpeedStrategy, arguments: Mapping[str, Any]) -> None:
    """Compares the settings of a run over its ranks; collective, once they can communicate.

    Args:
        strategy: the strategy, with the module of its Trainer.
        arguments: the strategy's own arguments.

    Raises:
        ConfigError: on all ranks, naming the first setting that differs.
    """
    module = strategy.lightning_module
    if dist.get_world_size() == 1 or module is None or module._trainer is None:
        return
    trainer = module._trainer
    own: dict[str, str] = {}
    for package in _PACKAGES:
        # Not the versions that are installed: the package may be used from a source directory.
        shown: str = sys.modules[package].__version__
        own[f"the version of {package}"] = shown.partition("+")[0]
    own["what the Trainer runs"] = f"Trainer.{trainer.state.fn and trainer.state.fn.value}"
    for name in _OF_STRATEGY:
        own[f"FastMoEStrategy({name}=)"] = repr(arguments[name])
    assert isinstance(strategy.config, dict)
    for name, value in _flat(strategy.config):
        own[f"the DeepSpeed config's {name}"] = repr(value)
    for name in _OF_TRAINER:
        own[f"Trainer({name}=)"] = repr(getattr(trainer, name))
    connector: Any = trainer._accelerator_connector
    own["Trainer(use_distributed_sampler=)"] = repr(connector.use_distributed_sampler)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    described = [line for line in map(_describe, callbacks) if line]
    for i, line in enumerate(described, 1):
        own[f"number {i} of the callbacks that communicate"] = line
    compare_settings(own)


def check_same_layers(layers: Mapping[str, ExpertLayer]) -> None:
    """Compares the layers' settings over the ranks; collective.

    Args:
        layers: name -> MoE layer, with the same parameters on every rank.

    Raises:
        ConfigError: on all ranks, naming the first difference.
    """
    if dist.get_world_size() == 1:
        return
    own = {}
    for name, layer in layers.items():
        own[f"the number of experts of {name}"] = repr(layer.num_experts)
        if isinstance(layer, MoE):
            own[f"the router of {name}"] = type(layer.router).__name__
            for setting in _OF_LAYER:
                own[f"{setting} of {name}"] = repr(getattr(layer, setting))
    compare_settings(own)


def check_same_optimizer(optimizer: Optimizer, schedulers: Sequence[LRSchedulerConfig]) -> None:
    """Compares what ``configure_optimizers`` returned over the ranks; collective.

    Args:
        optimizer: the optimizer, whose options are compared later.
        schedulers: its schedulers.

    Raises:
        ConfigError: on all ranks, naming the first difference.
    """
    if dist.get_world_size() == 1:
        return
    own = {"the optimizer": type(optimizer).__name__}
    for config in schedulers:
        own["the scheduler"] = type(config.scheduler).__name__
        for name in ("interval", "frequency", "monitor"):
            own[f"the scheduler's {name}"] = repr(getattr(config, name))
    compare_settings(own)


def compare_before_resuming(trainer: pl.Trainer) -> Callable[[], None]:
    """Compares whether ranks resume from a checkpoint, right before those that do so read it.

    A script that looks for its last checkpoint by itself may find it on some hosts only.

    Args:
        trainer: the Trainer, which has set up its strategy.

    Returns:
        A function that undoes it. In between, what would load a checkpoint is collective, and
        raises a ConfigError on all ranks if some have none.
    """
    connector: Any = trainer._checkpoint_connector
    if dist.get_world_size() == 1:
        return _nothing

    def resume_start(checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
        compare_settings({"ckpt_path": "a checkpoint" if checkpoint_path else "None"})
        type(connector).resume_start(connector, checkpoint_path, *args, **kwargs)

    def undo() -> None:
        vars(connector).pop("resume_start", None)

    connector.resume_start = resume_start
    return undo


def compare_settings(own: Mapping[str, str]) -> None:
    """Compares what is written here on every rank; collective.

    Args:
        own: name of a setting -> this rank's value, as text.

    Raises:
        ConfigError: on all ranks, naming the first setting that differs from rank 0's.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(own))
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in [*first, *other]:
            here, there = first.get(name, _ABSENT), other.get(name, _ABSENT)
            if here != there:
                raise ConfigError(
                    f"Ranks have different settings: {name} is {here} on rank 0 and {there} on rank"
                    f" {rank}. It must be identical on every rank."
                )


def _nothing() -> None:
    pass


def _describe(callback: pl.Callback) -> str:
    """A callback that ranks run together; empty for those that work alone."""
    kind = type(callback)
    if not isinstance(callback, _COMMUNICATING) and kind.__module__.split(".")[0] != _OWN_PACKAGE:
        return ""
    options = ""
    if isinstance(callback, ModelCheckpoint):
        # Not its directory and file name, which may contain the time: rank 0's count.
        names = ("save_top_k", "save_last", "save_weights_only")
        options = "".join(f", {name}={getattr(callback, name)!r}" for name in names)
    key = callback.state_key if isinstance(callback, Checkpoint | EarlyStopping) else kind.__name__
    return key + options


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested options, by dotted names."""
    for key, value in sorted(config.items(), key=lambda item: str(item[0])):
        if key in _OWN_TO_RANKS:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
