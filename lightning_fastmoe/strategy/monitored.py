"""Makes monitored values equal on all ranks, so that they checkpoint and stop together.

``self.log("loss", loss)`` without ``sync_dist`` keeps a value per rank, and Lightning's callbacks
act on it on every rank separately. Ranks then disagree on the best checkpoint, on the number of
collectives (a hang) and, with ReduceLROnPlateau, on the learning rate. So every rank gets rank 0's
value right before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_fastmoe.errors import ConfigError

_CANDIDATES = "_monitor_candidates"
_CHECK = "_run_early_stopping_check"
_SCHEDULE = "_get_monitor_value"
_NAME_IN_TEMPLATE = re.compile(r"\{([^:}]*)")


def share_monitored(trainer: pl.Trainer) -> Callable[[], None]:
    """Makes all ranks use rank 0's values wherever Lightning decides by a logged one.

    Args:
        trainer: the Trainer with the ``ModelCheckpoint``, ``EarlyStopping`` and
            ``ReduceLROnPlateau``.

    Returns:
        A function that restores the methods of the callbacks and the loop.
    """
    values = _SharedValues(trainer)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    loop = trainer.fit_loop.epoch_loop
    wrapped: list[tuple[Any, str, Callable[[Any], Any]]] = [(loop, _SCHEDULE, values.of_scheduler)]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            wrapped.append((callback, _CANDIDATES, values.of_checkpoint))
        if isinstance(callback, EarlyStopping):
            wrapped.append((callback, _CHECK, values.of_stopping))

    def undo() -> None:
        for owner, name, _ in wrapped:
            vars(owner).pop(name, None)

    undo()  # an earlier run may have ended without a teardown
    for owner, name, wrap in wrapped:
        vars(owner)[name] = wrap(owner)
    return undo


class _SharedValues:
    """Logged values, set to rank 0's right before they are used."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._warned: set[str] = set()

    def of_checkpoint(self, callback: ModelCheckpoint) -> Callable[[pl.Trainer], Any]:
        """Replaces ``_monitor_candidates``: the values that are compared or put into file names."""
        candidates = callback._monitor_candidates

        def shared(trainer: pl.Trainer) -> Any:
            templates = (callback.filename or "", callback.CHECKPOINT_NAME_LAST)
            names = {name for t in templates for name in _NAME_IN_TEMPLATE.findall(t)}
            self._share(names | {callback.monitor}, "ModelCheckpoint")
            return candidates(trainer)

        return shared

    def of_stopping(self, callback: EarlyStopping) -> Callable[[pl.Trainer], None]:
        """Replaces ``_run_early_stopping_check``."""
        check = callback._run_early_stopping_check

        def shared(trainer: pl.Trainer) -> None:
            self._share({callback.monitor}, "EarlyStopping")
            check(trainer)

        return shared

    def of_scheduler(self, loop: Any) -> Callable[[str], Any]:
        """Replaces the loop's ``_get_monitor_value``, which ReduceLROnPlateau uses."""
        get = loop._get_monitor_value

        def shared(key: str) -> Any:
            self._share({key}, "ReduceLROnPlateau")
            return get(key)

        return shared

    def _share(self, names: Iterable[str | None], reader: str) -> None:
        """Gives every rank the values of rank 0; every rank calls this.

        Raises:
            ConfigError: on all ranks, for a value that rank 0 has not logged but another rank has.
        """
        trainer = self._trainer
        wanted = sorted(name for name in names if name is not None)
        # After an error, ranks are no longer in step.
        if not wanted or trainer.world_size == 1 or trainer.interrupted:
            return
        logged = trainer.callback_metrics
        own = {n: torch.as_tensor(logged[n]).detach().cpu() for n in wanted if n in logged}
        everyone: list[dict[str, Tensor]] = [{}] * trainer.world_size
        dist.all_gather_object(everyone, own)
        first = everyone[0]
        for rank, values in enumerate(everyone):
            if missing := sorted(values.keys() - first.keys()):
                raise ConfigError(
                    f"{reader} monitors {missing[0]!r}, which rank {rank} has logged but rank 0 has"
                    " not. Rank 0's value is used on all ranks: log it on every rank."
                )
        for name, value in first.items():
            if all(_is_same(value, values.get(name)) for values in everyone):
                continue
            self._warn(name, reader)
            if trainer.global_rank != 0:
                _put(trainer, name, value)

    def _warn(self, name: str, reader: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            rank_zero_warn(
                f"{reader} monitors {name!r}, which differs between ranks, as it was logged without"
                " sync_dist=True. Rank 0's value is used on all ranks. To monitor the mean over"
                f" all ranks, call self.log({name!r}, ..., sync_dist=True)."
            )


def _is_same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a.nan_to_num(), b.nan_to_num()) and _nan(a) == _nan(b)


def _nan(value: Tensor) -> list[bool]:
    flags: list[bool] = value.isnan().flatten().tolist()
    return flags


def _put(trainer: pl.Trainer, name: str, value: Tensor) -> None:
    """Replaces a logged value, and the copies from which Lightning would read it later."""
    connector = trainer._logger_connector
    own = connector._callback_metrics.get(name)
    value = value.to(own.device if isinstance(own, Tensor) else trainer.strategy.root_device)
    connector._callback_metrics[name] = value
    results = trainer._results
    if results is None:
        return
    on_step = connector._first_loop_iter is not None
    for _, result in results.valid_items():
        if name in results._forked_name(result, on_step):
            if on_step and result.meta.on_step:
                result._forward_cache = value
            elif not on_step and result.meta.on_epoch:
                result._computed = value
