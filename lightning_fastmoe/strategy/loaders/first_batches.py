"""Looks at the first batches of the training data, which are then still to come."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import _set_sampler_epoch
from pytorch_lightning.trainer.connectors.data_connector import (
    _request_dataloader,
    _resolve_overfit_batches,
)
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from lightning_fastmoe.checkpoint.random_state import random_state, set_random_state
from lightning_fastmoe.errors import DataError

_CPU = torch.device("cpu")


@contextmanager
def generators_untouched(device: torch.device) -> Iterator[None]:
    """Restores on exit the random number generators of Python, NumPy, torch and the device."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def first_batches(trainer: pl.Trainer, number: int) -> list[Any]:
    """The batches with which a fit's first epoch would begin on this rank, on the CPU.

    The loader is asked for as Lightning asks, once more than in a run without this. Its samplers
    are copied and its samples read in this process, so that neither samplers nor workers notice. An
    iterable is copied as a whole, and refused where the original would have moved.

    Args:
        trainer: fits, and its callbacks and module are set up.
        number: how many, or fewer if there are fewer.

    Raises:
        DataError: if there is no training data yet, it comes from several loaders, or it could not
            start again.
    """
    with generators_untouched(_CPU):
        loader = _loader(trainer)
        limit = trainer.limit_train_batches
        if isinstance(limit, int):
            number = min(number, limit)
        elif limit < 1.0:
            with suppress(TypeError):
                number = min(number, max(1, int(len(loader) * limit)))
        _set_sampler_epoch(loader, trainer.current_epoch)
        by_index = isinstance(loader, DataLoader) and not isinstance(
            loader.dataset, IterableDataset
        )
        if by_index:
            with _own_generators_untouched(loader):
                return list(itertools.islice(_by_index(loader), number))
        return _of_iterable(loader, number)


def _loader(trainer: pl.Trainer) -> Any:
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise DataError(
            "There is no train_dataloader to take batches from: pass the data to trainer.fit(), or"
            " define train_dataloader()."
        )
    found = _request_dataloader(source)
    combined = found if isinstance(found, CombinedLoader) else CombinedLoader(found)
    if len(combined.flattened) != 1:
        raise DataError(
            f"The training data comes from {len(combined.flattened)} loaders, and batches are taken"
            " from one. Choose experts by select_experts() and pass them as experts={...}."
        )
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]  # set by a connector
        _resolve_overfit_batches(combined, mode=RunningStage.TRAINING)
    connector: Any = trainer._data_connector
    return connector._prepare_dataloader(
        combined.flattened[0], shuffle=True, mode=RunningStage.TRAINING
    )


def _by_index(loader: Any) -> Iterator[Any]:
    """What a ``DataLoader`` does in its workers, here, by a copy of its samplers."""
    dataset = loader.dataset
    try:
        # Together: the generator of a loader is mostly its sampler's, too.
        sampler, generator = copy.deepcopy(
            (loader._index_sampler, loader.generator), {id(dataset): dataset}
        )
    except Exception as error:
        raise _cannot_restart(loader._index_sampler, f"it can't be copied ({error})") from error
    batched = loader.batch_sampler is not None
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the seed of workers
    for index in sampler:
        if not batched:
            yield loader.collate_fn(dataset[index])
        elif hasattr(dataset, "__getitems__"):
            yield loader.collate_fn(dataset.__getitems__(index))
        else:
            yield loader.collate_fn([dataset[i] for i in index])


@contextmanager
def _own_generators_untouched(loader: Any) -> Iterator[None]:
    """Restores generators that the data and what collates it keep as attributes."""
    owners = [loader.dataset, loader.collate_fn]
    while hasattr(owners[-1], "dataset"):  # of a Subset
        owners.append(owners[-1].dataset)
    undo: list[tuple[Any, Any]] = []
    for value in (v for owner in owners for v in getattr(owner, "__dict__", {}).values()):
        if isinstance(value, torch.Generator):
            undo.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            undo.append((value.setstate, value.getstate()))
        elif isinstance(value, np.random.RandomState):  # noqa: NPY002  a user's
            undo.append((value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            bits: Any = value.bit_generator
            undo.append((lambda s, bits=bits: setattr(bits, "state", s), bits.state))
    try:
        yield
    finally:
        for restore, state in undo:
            restore(state)


def _of_iterable(loader: Any, number: int) -> list[Any]:
    """From copies: of two, the second shows whether what they share has moved."""
    begun = random_state(_CPU)
    taken = list(itertools.islice(_copied(loader), number))
    set_random_state(begun, _CPU)
    again = list(itertools.islice(_copied(loader), 1))
    if not _equal(taken[:1], again):
        raise _cannot_restart(loader, "a second look at it begins with other data")
    return taken


def _copied(loader: Any) -> Iterator[Any]:
    what: Any = loader.dataset if isinstance(loader, DataLoader) else loader
    try:
        data: Any = copy.deepcopy(what)
    except Exception as error:
        raise _cannot_restart(what, f"it can't be copied ({error})") from error
    if not isinstance(loader, DataLoader):
        yield from data
    elif loader.batch_size is None:
        yield from map(loader.collate_fn, data)
    else:
        samples = iter(data)
        while batch := list(itertools.islice(samples, loader.batch_size)):
            if len(batch) < loader.batch_size and loader.drop_last:
                return
            yield loader.collate_fn(batch)


def _equal(one: Any, other: Any) -> bool:
    ours, structure = pytree.tree_flatten(one)
    theirs, others = pytree.tree_flatten(other)
    if structure != others:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if not torch.equal(a, b):
                return False
        elif isinstance(a, str | bytes | int | float | bool) and a != b:
            return False
    return True


def _cannot_restart(what: Any, why: str) -> DataError:
    return DataError(
        f"Batches of {type(what).__name__} can't be looked at without using them up: {why}. Choose"
        " experts by select_experts() with batches of your own, and pass them as experts={...}."
    )
