"""Checks at set-up. Each error names the value, the rule and the fix, before any rank waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision.deepspeed import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_fastmoe.checkpoint.expert_names import why_mistaken, why_not_saved
from lightning_fastmoe.checkpoint.format.consistency import unlisted_layers
from lightning_fastmoe.checkpoint.save import local_path
from lightning_fastmoe.errors import CheckpointError, ConfigError, ForeignObjectError
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.zero.elementwise import is_elementwise
from lightning_fastmoe.zero.engine import FastMoEEngine

ACCUMULATION = "fastmoe_accumulate_grad_batches"
"""In checkpoints with the gradients of an unfinished step: of how many micro-batches it was."""
_FOREIGN = ("lightning.pytorch", "lightning.fabric")
# Listed by name: copies of some of them share native memory, so they can't be tried on a copy.
_ELEMENTWISE_OF_DEEPSPEED = (
    "FusedAdam",
    "DeepSpeedCPUAdam",
    "FusedLion",
    "DeepSpeedCPULion",
    "DeepSpeedCPUAdagrad",
)


def check_objects(owner: str, objects: Iterable[Any]) -> None:
    """Refuses objects of the ``lightning`` package, whose classes differ from pytorch_lightning's.

    Raises:
        ForeignObjectError: naming the object and what to import instead.
    """
    for item in objects:
        for base in type(item).__mro__:
            if base.__module__.startswith(_FOREIGN):
                raise ForeignObjectError(
                    f"{owner} got a {type(item).__name__}, which is a {base.__module__}."
                    f"{base.__name__}. The packages 'lightning' and 'pytorch_lightning' can't be"
                    f" mixed: import from pytorch_lightning (or lightning_fabric) instead, in the"
                    " whole program."
                )


def attached_module(strategy: DeepSpeedStrategy, method: str) -> pl.LightningModule:
    """The module of a strategy that has an engine.

    Raises:
        ConfigError: if there is no engine yet, naming ``method``.
    """
    module = strategy.lightning_module
    if module is None or not isinstance(strategy.model, FastMoEEngine):
        raise ConfigError(
            f"FastMoEStrategy.{method}() needs a model that a Trainer has set up, and none has"
            " been yet. Pass the path to Trainer.fit(..., ckpt_path=...), validate, test or"
            " predict; without a Trainer, create a module from a checkpoint with"
            " Module.load_from_checkpoint(path), or fill one with"
            " lightning_fastmoe.checkpoint.weights.load_weights(path, module)."
        )
    return module


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuses Trainer options that can't work correctly here.

    Raises:
        ConfigError: for gradient clipping by value or by hand, fp16 on the CPU, and a DeepSpeed
            config of another precision.
        ForeignObjectError: for callbacks, loggers and data modules of the ``lightning`` package.
    """
    parts: Any = trainer  # its attributes are set by connectors, which mypy does not see
    objects = [*parts.callbacks, *parts.loggers, parts.datamodule, module]
    check_objects("The Trainer", objects)
    if trainer.gradient_clip_algorithm == "value":
        raise ConfigError(
            "gradient_clip_algorithm='value' is not supported: gradients are partitioned over ranks"
            " and DeepSpeed clips by norm only. Use gradient_clip_algorithm='norm'."
        )
    if is_overridden("configure_gradient_clipping", module, pl.LightningModule):
        raise ConfigError(
            f"{type(module).__name__} overrides configure_gradient_clipping, which would not clip:"
            " DeepSpeed clips inside its step. Use Trainer(gradient_clip_val=...)."
        )
    plugin = trainer.strategy.precision_plugin
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu and isinstance(plugin, DeepSpeedPrecision) and plugin.precision.startswith("16"):
        raise ConfigError(
            f"precision={plugin.precision!r} is not supported on the CPU. Use '32-true',"
            " 'bf16-mixed' or 'bf16-true'."
        )
    if isinstance(plugin, DeepSpeedPrecision):
        _check_precision(plugin.precision, trainer.strategy.config)  # type: ignore[attr-defined]


def _check_precision(precision: str, config: Mapping[str, Any]) -> None:
    """Refuses a DeepSpeed config that would train in another precision than the Trainer's."""
    for key, prefix in (("bf16", "bf16"), ("fp16", "16")):
        enabled = (config.get(key) or {}).get("enabled")
        if isinstance(enabled, bool) and enabled != precision.startswith(prefix):
            raise ConfigError(
                f"The DeepSpeed config sets {key}.enabled to {enabled}, and the Trainer"
                f" precision={precision!r}. Drop it from the config: the Trainer's decides. (A"
                " strategy that has been used keeps the precision of its first Trainer: make a new"
                " one.)"
            )


def check_links(trainer: pl.Trainer) -> None:
    """Refuses links to checkpoints that are still being written.

    Raises:
        ConfigError: if a callback creates such links.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
            raise ConfigError(
                "ModelCheckpoint(save_last='link') would link 'last' to a checkpoint that is still"
                " being written with async_checkpoint=True, and a crash would leave no last one."
                " Use save_last=True."
            )


def check_optimizer(optimizer: Any) -> None:
    """Refuses optimizers that DeepSpeed would apply incorrectly.

    Raises:
        ConfigError: for Adagrad, for optimizers that are not elementwise, and for one that has
            already has state.
    """
    if isinstance(optimizer, torch.optim.Adagrad):
        raise ConfigError(
            "torch.optim.Adagrad is not supported: DeepSpeed recreates it with all parameters in"
            " one group, so groups lose their own lr and weight_decay. Use another optimizer,"
            " such as RMSprop or AdamW."
        )
    kind = type(optimizer)
    if kind.__module__.startswith("deepspeed."):
        elementwise = kind.__name__ in _ELEMENTWISE_OF_DEEPSPEED
    else:
        elementwise = is_elementwise(optimizer) is not False
    if not elementwise:
        raise ConfigError(
            f"{kind.__module__}.{kind.__name__} depends on whole parameters, such as their shape or"
            " norm, but under ZeRO it gets flat fragments of parameters: its updates would differ"
            " from those on one device, and change with the number of ranks. Use an elementwise"
            " optimizer, such as AdamW, RMSprop or SGD."
        )
    entries = getattr(optimizer, "state", {}).values()
    if any(value is not None for entry in entries for value in entry.values()):
        raise ConfigError(
            f"The {kind.__name__} that configure_optimizers returned already has state, from an"
            " earlier training for example, which ZeRO would discard. Create a new optimizer in"
            " configure_optimizers. To keep the state, save a checkpoint and resume with"
            " fit(ckpt_path=...); to discard it on purpose, call optimizer.state.clear() first."
        )


def advise_fused(optimizer: Any, device: torch.device) -> None:
    """Says that an optimizer of torch's could run as one kernel, and doesn't.

    Args:
        optimizer: the user's.
        device: where this rank trains.
    """
    kind = type(optimizer)
    can_fuse = kind.__module__.startswith("torch.optim.") and "fused" in optimizer.defaults
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    if device.type == "cuda" and can_fuse and not is_fused:
        name = kind.__name__
        rank_zero_info(
            f"{name} launches many kernels per step; {name}(fused=True) launches few. With"
            " AdamW, that made whole training steps of a 1 B parameter model on an H200 1.32 times"
            " as fast."
        )


def warn_of_idle_checkpointing(module: torch.nn.Module) -> None:
    """Says that transformers' models in evaluation mode don't checkpoint activations."""
    for name, part in module.named_modules():
        # The first name is that of transformers 5.24, which warns of the other.
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")
        known = next((name for name in names if hasattr(type(part), name)), None)
        if known is not None and getattr(part, known) and not part.training:
            rank_zero_warn(
                f"{name or type(module).__name__} is in evaluation mode, in which it neither"
                " checkpoints activations, as gradient_checkpointing_enable() asks, nor drops out:"
                " from_pretrained() returns it so, and Lightning leaves it so. Call .train()."
            )
            return


def warn_of_float64(module: torch.nn.Module, precision: str) -> None:
    """Says that DeepSpeed has no 64-bit weights, before it casts them."""
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.float64:
            rank_zero_warn(
                f"{name} is float64. DeepSpeed has no 64-bit precision, so precision={precision!r}"
                " casts the model. For float64, wrap it in ExpertDataParallel in a plain loop."
            )
            return


def check_directories(trainer: pl.Trainer) -> None:
    """Refuses unwritable checkpoint directories before training starts, not hours later.

    Raises:
        CheckpointError: if a callback saves to a URL.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            local_path(callback.dirpath)


def fixed_paths(trainer: pl.Trainer) -> list[Path]:
    """Paths that callbacks overwrite; for others they pick a free name."""
    paths = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            if getattr(callback, "_enable_version_counter", True):
                continue
            last = callback.CHECKPOINT_NAME_LAST if callback.save_last else None
            for name in (last, callback.filename):
                if name is not None and "{" not in name:
                    paths.append(local_path(callback.dirpath) / f"{name}{callback.FILE_EXTENSION}")
    return paths


def check_can_be_saved(
    trainer: pl.Trainer, module: torch.nn.Module, layers: Mapping[str, ExpertLayer]
) -> None:
    """Refuses to begin a run whose first checkpoint would fail.

    Raises:
        ConfigError: if the Trainer saves checkpoints, for sharded experts with state that can't be
            saved, and for modules whose parameters are named like a MoE layer's, or like the
            experts of one that are trained alone.
    """
    names = {name for name, _ in module.named_parameters()}  # a shared layer's are its first ones
    for other in unlisted_layers(names, layers):
        if trainer.checkpoint_callbacks:
            raise ConfigError(
                f"{other!r} is not a MoE layer of this package, but has a router and stacked"
                f" experts under the same names ({other}.experts.up_proj, ...). Checkpoints use"
                " these names to check that every MoE layer is listed. Use MoE, or rename its"
                " parts. Or train with Trainer(enable_checkpointing=False)."
            )
    reasons = [why_not_saved(n, layer) for n, layer in layers.items() if layer.is_sharded]
    for why in (*reasons, why_mistaken(module, layers)):
        if why and trainer.checkpoint_callbacks:
            raise ConfigError(f"{why} Or train with Trainer(enable_checkpointing=False).")


def check_order_is_known(path: Path, layers: Mapping[str, ExpertLayer]) -> None:
    """Refuses single files whose optimizer state can't be matched: it is ordered, not named.

    Raises:
        CheckpointError: if the order differs between ranks.
    """
    for name, layer in layers.items():
        if layer.is_sharded and not layer.experts.is_stacked:
            raise CheckpointError(
                f"Training can't resume from {path}: the optimizer state in a single file"
                f" identifies parameters by their order, and the experts of layer {name!r}, modules"
                " sharded over ranks, are in a different order on each. Resume from it with"
                " expert_parallel_size=1 and save: that checkpoint resumes on any ranks."
            )


def check_same_accumulation(saved: int | None, trainer: pl.Trainer) -> None:
    """Refuses to finish a step with another accumulation than it was begun with.

    Its first micro-batches were weighted for that one, so the gradient would be no mean.

    Args:
        saved: what the checkpoint has under :data:`ACCUMULATION`.
        trainer: about to continue in the middle of a step.

    Raises:
        CheckpointError: naming both.
    """
    now = trainer.accumulate_grad_batches
    if saved not in (None, now):
        raise CheckpointError(
            "The checkpoint was saved in the middle of a step, with"
            f" accumulate_grad_batches={saved}, and this run has accumulate_grad_batches={now}: the"
            f" step would be the mean of neither. Resume with {saved}, or from a checkpoint that"
            " was saved after a step."
        )


def warn_within_batch(trainer: pl.Trainer, filepath: Any) -> None:
    """Warns what a checkpoint saved in the middle of a training batch lacks."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if batches.ready > batches.processed:
        rank_zero_warn(
            f"{filepath} is saved in the middle of a training batch. When training resumes from it,"
            " the batch is repeated with other random numbers, and if its backward pass had"
            " begun, the gradient of this one step is not exact. A data loader that keeps its"
            " own state continues after the batch."
        )


def check_single(optimizers: Sequence[Any], schedulers: Sequence[Any]) -> None:
    """Refuses several optimizers or schedulers, which one engine can't step.

    Raises:
        ConfigError: naming the alternatives.
    """
    if len(optimizers) != 1 or len(schedulers) > 1:
        raise ConfigError(
            f"configure_optimizers returned {len(optimizers)} optimizer(s) and"
            f" {len(schedulers)} scheduler(s); FastMoEStrategy takes exactly one optimizer and"
            " at most one scheduler. Put all parameters into groups of one optimizer, and chain"
            " schedulers with torch.optim.lr_scheduler.SequentialLR."
        )
