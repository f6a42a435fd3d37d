"""Runs training steps before the optimizer exists: no gradients, and nothing remembers them."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.trainer import call
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection

from lightning_fastmoe.errors import ConfigError, DataError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.strategy.fastmoe import FastMoEStrategy
from lightning_fastmoe.strategy.loaders.first_batches import first_batches, generators_untouched
from lightning_fastmoe.strategy.loaders.untouched import untouched

_HOOK = "configure_optimizers"


def before_optimizers(
    module: pl.LightningModule, function: Callable[[], None]
) -> Callable[[], None]:
    """Calls a function once, when ``module``'s optimizers are about to be made.

    By then the strategy has sharded the experts, and their ranks can exchange tokens.

    Returns:
        A function that cancels it.
    """
    original = getattr(module, _HOOK)
    own = vars(module).get(_HOOK)

    @functools.wraps(original)
    def first(*args: Any, **kwargs: Any) -> Any:
        cancel()
        function()
        return original(*args, **kwargs)

    def cancel() -> None:
        if vars(module).get(_HOOK) is first:
            del vars(module)[_HOOK]
            if own is not None:
                vars(module)[_HOOK] = own

    vars(module)[_HOOK] = first
    return cancel


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuses strategies that have wrapped the model when optimizers are made.

    Raises:
        ConfigError: naming the strategy.
    """
    if not isinstance(trainer.strategy, FastMoEStrategy | SingleDeviceStrategy):
        raise ConfigError(
            f"Steps before the optimizer exists don't work with {type(trainer.strategy).__name__}:"
            " use FastMoEStrategy or one device, or choose experts by select_experts() and pass"
            " them as experts={...}."
        )


def early_batches(trainer: pl.Trainer, number: int) -> list[Any]:
    """:func:`first_batches`, as many on each rank: the forward passes exchange tokens.

    Raises:
        DataError: on all ranks, if one has none.
    """
    batches: list[Any] = []
    fault: Exception | None = None
    try:
        batches = first_batches(trainer, number)
    except Exception as error:
        fault = error
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everyone: list[Any] = [None] * dist.get_world_size()
        said = None if fault is None else f"{type(fault).__name__}: {fault}"
        dist.all_gather_object(everyone, (len(batches), said))
        failed = [(rank, said) for rank, (_, said) in enumerate(everyone) if said is not None]
        if fault is None and failed:
            raise DataError(f"Rank {failed[0][0]} could not take batches: {failed[0][1]}")
        batches = batches[: min(count for count, _ in everyone)]
    if fault is not None:
        raise fault
    if not batches:
        raise DataError("There is no training batch, on one rank at least: every rank needs one.")
    return batches


@contextmanager
def early_steps(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Callable[[Any], None]]:
    """Gives a function that runs ``training_step`` on a batch of the CPU, without gradients.

    The model is on the strategy's device and in the run's precision. What steps log, metrics,
    buffers, random number generators and the module's own attributes are afterwards as before.

    Raises:
        ConfigError: for manual optimization.
    """
    if not module.automatic_optimization:
        raise ConfigError(
            f"training_step of {type(module).__name__} optimizes by itself, so it can't run before"
            " its optimizers exist: choose experts by select_experts() and pass experts={...}."
        )
    device = trainer.strategy.root_device
    module.to(device)  # DeepSpeed would, once the optimizer exists
    loop: Any = trainer.fit_loop.epoch_loop
    connector: Any = trainer._logger_connector
    kept = (loop._results, connector._current_fx, module._current_fx_name)

    def step(batch: Any) -> None:
        plugin = trainer.precision_plugin
        if not _is_cast_later(trainer):
            batch = plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        loop._results = _ResultCollection(training=True)
        loop._results.batch = batch
        module._current_fx_name = "training_step"
        arguments = loop._build_kwargs(OrderedDict(), batch, 0)
        with torch.no_grad(), untouched(module), _precision(trainer):
            module.training_step(*arguments.values())
        if isinstance(trainer.strategy, FastMoEStrategy):
            layers = [layer for _, layer in expert_layers(module)]
            trainer.strategy._groups.end_pass(layers)
            trainer.strategy._watch.beat()

    try:
        with generators_untouched(device):
            yield step
    finally:
        loop._results, connector._current_fx, module._current_fx_name = kept


def _is_cast_later(trainer: pl.Trainer) -> bool:
    """Whether DeepSpeed will cast the weights, which are in fp32 until the engine exists."""
    mixed = str(trainer.precision_plugin.precision).endswith("-mixed")
    return mixed and isinstance(trainer.strategy, FastMoEStrategy)


def _precision(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    if not _is_cast_later(trainer):
        return trainer.precision_plugin.forward_context()
    kind = str(trainer.precision_plugin.precision)
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float16
    device = trainer.strategy.root_device.type
    if device == "cpu" and dtype is torch.float16:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype)
