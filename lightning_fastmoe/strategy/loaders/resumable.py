"""Lets training loaders without a state of their own resume within an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader, IterableDataset

from lightning_fastmoe.checkpoint.random_state import random_state, set_random_state
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.strategy.loaders.interrupts import leave_interrupts_to_ranks

_CPU = torch.device("cpu")
_BATCHES, _BEGUN, _SAMPLED = "batches_of_epoch", "begun", "sampled"


def resumable(loader: Any, trainer: Any) -> Any:
    """Returns the loader if it has a state, else a wrapper with one, and sets the sampler's epoch.

    Its workers leave Ctrl-C to their rank.

    Lightning makes the iterator of a run's first epoch before it tells the sampler which epoch that
    is. Workers begin at once, and would take the order of epoch 0.

    Args:
        loader: just before its iterator is made.
        trainer: if it does not train, the loader stays as it is. If its fit loop restarts, that
            loop's progress is the checkpoint's.
    """
    loader = leave_interrupts_to_ranks(loader)
    if not trainer.training:
        return loader
    _set_sampler_epoch(loader, _epoch(trainer.fit_loop))
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return loader
    return ResumableLoader(loader, trainer.fit_loop)


def is_own_state(state: Any) -> bool:
    """Whether a loader's state is one of :class:`ResumableLoader`."""
    return isinstance(state, dict) and _BATCHES in state


def for_other_ranks(states: list[Any]) -> list[Any]:
    """The loaders' states of one rank, for a run on another number of ranks.

    The position in the epoch stays valid if the global batch size is the same; random states don't.
    """
    return [{_BATCHES: s[_BATCHES]} if is_own_state(s) else s for s in states]


def _epoch(fit_loop: Any) -> int:
    """The epoch that starts or continues, as ``fit_loop.reset()`` is about to compute it."""
    fit_loop.update_restart_stage()
    epoch_loop = fit_loop.epoch_loop
    ended = (
        fit_loop.restarted_mid_epoch
        and epoch_loop.restarted_on_train_batch_end
        and epoch_loop.batch_progress.is_last_batch
    )
    return int(fit_loop.epoch_progress.current.processed) + int(ended)


class ResumableLoader:
    """Wraps a loader and tracks its position in the epoch.

    A checkpoint within an epoch stores the number of finished batches and the random state at the
    start of the epoch. On resuming, the sampler is advanced by that many batches without reading
    data; a loader without a sampler reads and discards them.

    Args:
        loader: a ``DataLoader``, or any iterable.
        fit_loop: the Trainer's fit loop.
    """

    def __init__(self, loader: Any, fit_loop: Any) -> None:
        self._loader, self._fit_loop = loader, fit_loop
        self._done = self._skip = 0
        self._begun: dict[str, Any] | None = None
        self._resumed: dict[str, Any] = {}
        self._indices = _Indices.of(loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def _iterator(self) -> Any:
        """The iterator of persistent workers, which Lightning shuts down and clears after a run."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value

    def __len__(self) -> int:
        return len(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch; zero between epochs."""
        progress = self._fit_loop.epoch_loop.batch_progress
        fetcher = self._fit_loop._data_fetcher
        # Without one, the fit has ended: Lightning then resumes at the start of a cut off epoch.
        if (
            fetcher is None
            or progress.is_last_batch
            or not progress.current.processed
            or self._begun is None
        ):
            return {_BATCHES: 0}
        ahead = fetcher.fetched - progress.current.processed  # fetched, but not trained on
        state = {_BATCHES: max(0, self._done - ahead), _BEGUN: self._begun}
        if self._indices is not None and self._indices.begun is not None:
            state[_SAMPLED] = self._indices.begun
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts the next iterator where the state was saved.

        Raises:
            CheckpointError: if another kind of loader saved the state.
        """
        if not is_own_state(state):
            raise CheckpointError(
                "The checkpoint has the state of a data loader that keeps its own, but the run's"
                f" {type(self._loader).__name__} has no load_state_dict. Resume with the loader"
                " that was used when it was saved."
            )
        self._skip, self._resumed = int(state[_BATCHES]), state

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        resumed, self._resumed = self._resumed, {}
        self._done = skip
        if not skip:
            self._begun = random_state(_CPU)
            return self._count(self._iterate(0, None))
        now = random_state(_CPU)
        if _BEGUN in resumed:
            set_random_state(resumed[_BEGUN], _CPU)
        self._begun = random_state(_CPU)
        iterator = self._iterate(skip, resumed.get(_SAMPLED))
        set_random_state(now, _CPU)
        return self._count(iterator)

    def _iterate(self, skip: int, sampled: dict[str, Any] | None) -> Iterator[Any]:
        if self._indices is not None:
            return self._indices.iterate(self._loader, skip, sampled)
        iterator: Iterator[Any] = iter(self._loader)
        for _ in itertools.islice(iterator, skip):
            pass
        return iterator

    def _count(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self._done += 1
            yield batch


class _Indices:
    """Replaces a loader's sampler while an iterator is created.

    Attributes:
        begun: the random numbers when the sampler of the last epoch began. That is not when the
            iterator is made: without workers it begins with the first batch.
    """

    def __init__(self, sampler: Any) -> None:
        self.begun: dict[str, Any] | None = None
        self._sampler = sampler
        self._skip = 0
        self._sampled: dict[str, Any] | None = None

    @classmethod
    def of(cls, loader: Any) -> _Indices | None:
        """Wraps the sampler of a loader that reads by index; None for other loaders."""
        by_index = isinstance(loader, DataLoader) and not isinstance(
            loader.dataset, IterableDataset
        )
        return cls(loader._index_sampler) if by_index else None

    def iterate(
        self, loader: DataLoader[Any], skip: int, sampled: dict[str, Any] | None
    ) -> Iterator[Any]:
        """An iterator of ``loader`` that starts at batch ``skip``."""
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._skip, self._sampled = skip, sampled  # workers take two iterators of indices
        # Bypasses DataLoader.__setattr__, which refuses this.
        vars(loader)[name] = self
        try:
            return iter(loader)
        finally:
            vars(loader)[name] = self._sampler
            self._skip = 0

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        if not self._skip:
            return self._begin()
        now = random_state(_CPU)
        if self._sampled is not None:
            set_random_state(self._sampled, _CPU)
        indices = self._begin()
        for _ in itertools.islice(indices, self._skip):
            pass
        set_random_state(now, _CPU)
        return indices

    def _begin(self) -> Iterator[Any]:
        self.begun = random_state(_CPU)
        yield from self._sampler
