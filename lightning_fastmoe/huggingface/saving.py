"""``save_pretrained`` of a model whose experts are on many ranks."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.errors import ConfigError, FastMoEError
from lightning_fastmoe.huggingface.exporting_in_place import export_in_place
from lightning_fastmoe.huggingface.peft_modules import linear_adapters
from lightning_fastmoe.nn.experts.lora import SCALE

_SHOWN = 8
"""Names in a warning."""


def save_pretrained(
    trainer: Any,
    path: Any,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the trained model as transformers' ``save_pretrained`` does; every rank calls this.

    The ranks write a checkpoint next to ``path``, which rank 0 then converts one stack of experts
    at a time, and deletes. So no rank holds the model, and both need space on the disk, which all
    ranks must share. Adapters of experts, and PEFT's of linear layers, are merged into the weights;
    experts in 4 bits are written in bf16, or ``dtype``. While ``WeightAveraging`` averages, the
    averages are written. Save the tokenizer yourself, and what is trained beside the model, such as
    a value head: a warning names it.

    Args:
        trainer: a Trainer with FastMoEStrategy, during or after ``fit``.
        path: the new directory.
        dtype: dtype to convert weights to; None keeps that of the optimizer's weights, fp32 in
            mixed precision.
        max_shard_bytes: maximum size of a file, unless it holds a single tensor.

    Raises:
        ConfigError: on all ranks, if the Trainer has another strategy, its module has no model of
            transformers or more than one, linear layers are quantised, or ``path`` exists.
    """
    prefix, model = the_model(trainer)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(
            f"save_pretrained: linear layers of {type(model).__name__} are quantised"
            " (quantization_config), so their weights aren't known in full. Save the adapters"
            " with lightning_fastmoe.huggingface.save_adapters(trainer, path)."
        )
    path = agree_on_new(trainer, "save_pretrained", path)
    warn_of_others(trainer, "save_pretrained", prefix, model)
    files, config = (path.with_name(f".{path.name}.fastmoe-{part}") for part in ("saved", "config"))
    save(trainer, files, exclude_frozen=False)

    def write() -> None:
        try:
            about = copy.deepcopy(model.config)
            about.architectures = [type(model).__name__]  # as transformers' own does
            about.save_pretrained(config)
            if model.can_generate():
                model.generation_config.save_pretrained(config)
            with CheckpointReader(files) as reader:
                export_in_place(
                    reader,
                    path,
                    config,
                    prefix=prefix,
                    lora_scale=lora_scale(model),
                    linear_scales={n: a.scale for n, a in linear_adapters(model).items()},
                    dtype=dtype,
                    max_shard_bytes=max_shard_bytes,
                )
        finally:
            for folder in (files, config):
                shutil.rmtree(folder, ignore_errors=True)

    on_rank_zero(trainer, "save_pretrained", write)


def agree_on_new(trainer: Any, what: str, path: Any) -> Path:
    """Rank 0's path, before anything is written.

    Raises:
        ConfigError: on all ranks, if there is something at it.
    """
    own = Path(path)
    agreed: Path
    agreed, exists = trainer.strategy.broadcast((own, os.path.lexists(own)))
    if exists:
        raise ConfigError(f"{what}: {agreed} exists already. Choose another name.")
    return agreed


def on_rank_zero(trainer: Any, what: str, function: Callable[[], None]) -> None:
    """Calls a function on rank 0, while the other ranks wait.

    Raises:
        ConfigError: on all ranks, if the function raises anything.
    """
    said, error = "", None
    if trainer.is_global_zero:
        try:
            function()
        except Exception as raised:  # whatever it is, the other ranks wait for its end
            known = isinstance(raised, FastMoEError)
            said, error = f"{raised}" if known else f"{type(raised).__name__}: {raised}", raised
    if said := trainer.strategy.broadcast(said):
        raise ConfigError(f"{what}: {said}") from error


def save(trainer: Any, path: Path, *, exclude_frozen: bool) -> None:
    """Writes a checkpoint of the weights, whatever others leave out, and waits for it."""
    strategy = trainer.strategy
    usual, strategy.exclude_frozen_parameters = strategy.exclude_frozen_parameters, exclude_frozen
    try:
        trainer.save_checkpoint(path, weights_only=True)
    finally:
        strategy.exclude_frozen_parameters = usual
    strategy.wait_for_checkpoint()


def lora_scale(model: Any) -> float | None:
    """That of the experts' adapters, which is the same in all layers."""
    return next((vars(part)[SCALE] for part in model.modules() if SCALE in vars(part)), None)


def the_model(trainer: Any) -> tuple[str, Any]:
    """The prefix and the module of the only model of transformers that the Trainer trains.

    Raises:
        ConfigError: if there is not one, or the strategy is another.
    """
    from transformers import PreTrainedModel

    strategy, module = trainer.strategy, trainer.lightning_module
    if not hasattr(strategy, "wait_for_checkpoint"):
        raise ConfigError(
            f"{type(strategy).__name__} holds whole models; call save_pretrained of the model"
            " itself."
        )
    outermost: dict[str, Any] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(other) for other in outermost)
        if isinstance(part, PreTrainedModel) and not inside:
            outermost[f"{name}."] = part
    if len(outermost) != 1:
        raise ConfigError(
            f"{type(module).__name__} has {len(outermost) or 'no'} models of transformers; to save"
            " it, there must be one."
        )
    return next(iter(outermost.items()))


def warn_of_others(trainer: Any, what: str, prefix: str, model: nn.Module) -> None:
    """Warns, once and on rank 0, of trained parameters outside of the model that is written.

    Args:
        trainer: trains the module around the model.
        what: the function that writes it.
        prefix: the model's, in the module.
        model: the model.
    """
    inside = {id(parameter) for parameter in model.parameters()}
    others = [
        name
        for name, parameter in trainer.lightning_module.named_parameters()
        if parameter.requires_grad and id(parameter) not in inside and not name.startswith(prefix)
    ]
    if others and trainer.is_global_zero:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        warnings.warn(
            f"{what} writes {prefix.removesuffix('.') or 'the model'} alone: also trained, and not"
            f" written, are {', '.join(others[:_SHOWN])}{more}. Checkpoints have them:"
            " trainer.save_checkpoint(path).",
            stacklevel=3,
        )
