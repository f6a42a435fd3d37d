"""Refuses Lightning options that this strategy doesn't support, before anything is built.

The table in docs/lightning_features.md lists all of it, and what works.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_fastmoe.errors import ConfigError

_CALLBACKS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "Lightning refuses it for every strategy on DeepSpeed. Set"
    " trainer.accumulate_grad_batches in your own on_train_epoch_start, which is exact here",
    LearningRateFinder: "it sets the learning rate of an optimizer that the engine has taken over"
    " by then. Search with another strategy, with a small model on one device",
    BatchSizeFinder: "when one rank runs out of memory, the others continue and would wait for"
    " it. Try a few batch sizes by hand; MoESummary shows the memory of each",
    BaseFinetuning: "it adds parameters to the optimizer while training, which ZeRO would never"
    " update. Set requires_grad in __init__ or configure_model, and start a second fit for the"
    " next phase",
    ModelPruning: "it replaces parameters, of which ZeRO keeps its own copies. Prune the exported"
    " model",
    StochasticWeightAveraging: "it averages copies of whole models, but parameters are split over"
    " ranks here. Average checkpoints instead",
}


def check_trainer_options(module: pl.LightningModule | None) -> None:
    """Refuses options of the Trainer, callbacks and hooks that would have no effect or fail.

    Loggers that would trace the model are kept from it, with a warning.

    Raises:
        ConfigError: naming the option and what to do instead.
    """
    if module is None or module._trainer is None:
        return
    trainer = module._trainer
    strategy: Any = trainer.strategy
    if strategy._layer_sync is not None:
        raise ConfigError(
            "sync_batchnorm=True is not supported: it would convert the batch norms of experts too,"
            " and ranks hold different experts. Convert the other modules in __init__ or"
            " configure_model with torch.nn.SyncBatchNorm.convert_sync_batchnorm, which needs GPUs,"
            " and drop the option."
        )
    if type(strategy.checkpoint_io) is not TorchCheckpointIO:
        raise ConfigError(
            f"The plugin {type(strategy.checkpoint_io).__name__} would have no effect: every rank"
            " writes its own files of a checkpoint directory. Drop it; to write in the background"
            " use FastMoEStrategy(async_checkpoint=True)."
        )
    _leave_out_graphs(trainer)
    if not trainer.training:
        return
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigError(f"{type(callback).__name__} is not supported: {reason}.")
    if is_overridden("backward", module, pl.LightningModule):
        raise ConfigError(
            f"{type(module).__name__} overrides backward(), which would never be called: the engine"
            " runs the backward pass. Use on_before_backward and on_after_backward, or manual"
            " optimization."
        )
    for owner in (module, *callbacks):
        if "grad_norm" in _names(getattr(owner, "on_before_optimizer_step", None)):
            raise ConfigError(
                f"{type(owner).__name__}.on_before_optimizer_step calls grad_norm, which would"
                " find no gradients: ZeRO keeps them partitioned over ranks. Log"
                " trainer.strategy.deepspeed_engine.get_global_grad_norm() in on_train_batch_end;"
                " it is the norm before clipping."
            )


def _leave_out_graphs(trainer: pl.Trainer) -> None:
    """Keeps loggers from tracing the model, with a warning.

    They run it on rank 0 only, which can't reach the experts of other ranks.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and logger._log_graph:
            logger._log_graph = False
            rank_zero_warn(
                "TensorBoardLogger(log_graph=True) logs no graph under FastMoEStrategy: it runs the"
                " model on rank 0 only, which can't reach the experts of other ranks. Log it from"
                " a run on one process without the strategy."
            )


def check_has_no_closure(optimizer: torch.optim.Optimizer) -> None:
    """Refuses optimizers that evaluate the loss several times in a step.

    Raises:
        ConfigError: for LBFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "torch.optim.LBFGS is not supported: it evaluates the loss several times in a step,"
            " and the engine evaluates it once. Use AdamW, or another optimizer without a closure."
        )


def _names(hook: Any) -> Iterator[str]:
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    if isinstance(code, CodeType):
        yield from code.co_names
