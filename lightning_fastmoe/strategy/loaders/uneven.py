"""Keeps ranks with different numbers of batches in step.

Every forward pass exchanges tokens between ranks, so all ranks must run the same number of forward
passes. The rules:

- in fit, an epoch has as many steps as the rank with the fewest batches has batches;
- validation, testing and prediction count each sample once: a rank with fewer batches runs extra
  steps on its last batch, so that the others can continue, and discards their results.

A loader's extra steps run when Lightning asks for the batch after this rank's last. By then the
rank's own steps are done, but Lightning and torchmetrics have not yet reduced their results, so all
ranks run the same steps and reductions in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from pytorch_lightning.overrides.distributed import (
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer import call
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection
from pytorch_lightning.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler

from lightning_fastmoe.errors import DataError
from lightning_fastmoe.strategy.loaders.untouched import untouched

_NO_LENGTH = -1


class UnevenData:
    """Keeps the ranks in step; one object per strategy.

    Args:
        strategy: the strategy, with its Trainer, ranks and steps.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._step = ""

    @property
    def _module(self) -> pl.LightningModule:
        module = self.strategy.lightning_module
        assert module is not None
        return module

    @property
    def _trainer(self) -> Any:
        return self._module.trainer

    def wrap(self, dataloader: object) -> object:
        """Returns the loader itself if all ranks have the same number of batches, else a wrapper.

        Called by all ranks at the same point.

        Raises:
            DataError: if a rank has no batch while another has some.
        """
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return dataloader
        lengths = self._gather(_length(dataloader))
        if _NO_LENGTH in lengths:
            return UnsizedLoader(dataloader, self)
        if min(lengths) == 0 < max(lengths):
            raise DataError(
                f"Rank {lengths.index(0)} has no batch, but other ranks have up to {max(lengths)}."
                " Every rank needs at least one batch: use fewer ranks, a smaller batch size, or"
                " more data."
            )
        if min(lengths) != max(lengths) or _pads(dataloader):
            return SizedLoader(dataloader, self, lengths)
        return dataloader

    def trains_on(self, loader: object) -> bool:
        """Whether ``loader`` is (part of) the training data, as opposed to evaluation data."""
        combined = self._trainer.fit_loop._combined_loader
        return combined is not None and any(item is loader for item in combined.flattened)

    def agree(self, has_batch: bool) -> list[bool]:
        """Whether each rank has another batch."""
        return [bool(flag) for flag in self._gather(int(has_batch))]

    def fill_up(self, step: str) -> None:
        """At the start of an evaluation, checks that extra steps can run in the right place.

        Args:
            step: "validation_step", "test_step" or "predict_step".

        Raises:
            DataError: on all ranks, if they can't.
        """
        self._step = step
        combined = self._evaluation_loop()._combined_loader
        loaders = combined.flattened
        wrapped = [loader for loader in loaders if isinstance(loader, _Loader)]
        if wrapped and combined._mode != "sequential":
            raise DataError(
                "Evaluation loaders whose lengths differ between ranks, or are not known, can't be"
                f" combined by CombinedLoader(mode={combined._mode!r}). Use mode='sequential'."
            )
        if any(isinstance(loader, UnsizedLoader) for loader in wrapped):
            # Lightning then fetches one batch ahead, even past the end of a loader.
            for loader in loaders[1:]:
                if isinstance(loader, SizedLoader):
                    check_second_batch(self._gather(loader.own_length()))

    @torch.no_grad()
    def extra_step(self, loader: object, batch: Any) -> None:
        """Runs an evaluation step for the other ranks and discards all its effects."""
        trainer, module = self._trainer, self._module
        loop = self._evaluation_loop()
        loaders = loop._combined_loader.flattened
        index = self.index_of(loader)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=index)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=index)
        kwargs = loop._build_kwargs(batch, 0, index if len(loaders) > 1 else None)
        arguments = loop._build_step_args_from_hook_kwargs(kwargs, self._step)
        with _nothing_logged(trainer, loop, batch, kwargs.get("dataloader_idx")), untouched(module):
            call._call_strategy_hook(trainer, self._step, *arguments)

    def index_of(self, loader: object) -> int:
        """The index of ``loader`` among the loaders of the running evaluation."""
        loaders = self._evaluation_loop()._combined_loader.flattened
        return next(i for i, item in enumerate(loaders) if item is loader)

    def batch_limit(self, loader: object) -> float:
        """The number of batches after which the running loop stops, the same on every rank."""
        if self.trains_on(loader):
            limit = self._trainer.limit_train_batches
            return limit if isinstance(limit, int) else math.inf
        return float(self._evaluation_loop().max_batches[self.index_of(loader)])

    def _evaluation_loop(self) -> Any:
        trainer = self._trainer
        return trainer.predict_loop if trainer.predicting else trainer._evaluation_loop

    def _gather(self, value: int) -> list[int]:
        return [row[0] for row in self._gather_lists([value])]

    def _gather_lists(self, values: list[int]) -> list[list[int]]:
        own = torch.tensor(values, dtype=torch.int64, device=self.strategy.root_device)
        table = own.new_empty((dist.get_world_size(), len(values)))
        dist.all_gather(list(table.unbind()), own)
        rows: list[list[int]] = table.tolist()
        return rows


class _Loader:
    """Wraps a loader and forwards its attributes."""

    def __init__(self, loader: Any, uneven: UnevenData) -> None:
        self._loader = loader
        self._uneven = uneven

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_uneven"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    # Defined explicitly, as Lightning looks for them without __getattr__.

    def state_dict(self) -> Any:
        """The loader's own state; every training loader has one."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Loads the loader's own state."""
        self._loader.load_state_dict(state)


class SizedLoader(_Loader):
    """A loader of known length: cut to the shortest rank's in training, whole in evaluation.

    In evaluation all ranks report the longest rank's length, so that Lightning's limits agree.

    Lightning's sampler repeats samples so that all ranks have the same number; evaluation would
    count these twice, so there the loader reads each sample once.

    Args:
        loader: the wrapped loader.
        uneven: keeps the ranks in step.
        lengths: the lengths of the loaders of all ranks.
    """

    def __init__(self, loader: Any, uneven: UnevenData, lengths: list[int]) -> None:
        super().__init__(loader, uneven)
        self._shortest, self._longest = min(lengths), max(lengths)
        self._once: Any = None

    def __len__(self) -> int:
        return self._shortest if self._uneven.trains_on(self) else self._longest

    def own_length(self) -> int:
        """The number of batches of this rank in evaluation."""
        return len(self._each_once())

    def __iter__(self) -> Iterator[Any]:
        if self._uneven.trains_on(self):
            return itertools.islice(self._loader, self._shortest)
        return self._evaluate(self._uneven.batch_limit(self))

    def _evaluate(self, limit: float) -> Iterator[Any]:
        batch: Any = None
        seen = 0
        for batch in itertools.islice(self._each_once(), int(limit)):  # noqa: B007  used below
            seen += 1
            yield batch
        for _ in range(seen, int(limit)):
            self._uneven.extra_step(self, batch)

    def _each_once(self) -> Any:
        if self._once is None:
            self._once = _without_padding(self._loader) if _pads(self._loader) else self._loader
        return self._once


class UnsizedLoader(_Loader):
    """A loader of unknown length; before each batch, ranks exchange whether they have another."""

    def __iter__(self) -> Iterator[Any]:
        uneven = self._uneven
        training = uneven.trains_on(self)
        limit = uneven.batch_limit(self)
        iterator = iter(self._loader)
        last: Any = None
        seen = 0
        exhausted = False
        while seen < limit:
            batch, exhausted = (None, True) if exhausted else _next(iterator)
            flags = uneven.agree(not exhausted)
            if seen == 0 and any(flags) and not all(flags):
                raise DataError(
                    f"Rank {flags.index(False)} has no batch, but other ranks have some. Every rank"
                    " needs at least one batch: use fewer ranks or more data."
                )
            if not any(flags) or (training and not all(flags)):
                return
            if seen == 1 and not training and uneven.index_of(self) > 0:
                check_second_batch([1 + flag for flag in flags])
            if exhausted:
                uneven.extra_step(self, last)
            else:
                last = batch
                yield batch
            seen += 1


def check_second_batch(lengths: list[int]) -> None:
    """Checks for a second batch, which Lightning fetches before the first step.

    Args:
        lengths: each rank's number of batches in a loader other than the first.

    Raises:
        DataError: if one rank has a single batch and another has more.
    """
    if min(lengths) == 1 < max(lengths):
        raise DataError(
            f"Rank {lengths.index(1)} has a single batch in an evaluation loader, but other ranks"
            " have more, and it follows or is a loader of unknown length. Give every rank at least"
            " two batches there, or make it the first loader."
        )


def _next(iterator: Iterator[Any]) -> tuple[Any, bool]:
    try:
        return next(iterator), False
    except StopIteration:
        return None, True


def _length(loader: Any) -> int:
    length = sized_len(loader)
    return _NO_LENGTH if length is None else length


def _pads(loader: Any) -> bool:
    """Whether the loader's sampler repeats samples so that all ranks have the same number."""
    sampler: Any = getattr(loader, "sampler", None)
    return (
        type(sampler) in (DistributedSampler, DistributedSamplerWrapper)
        and not sampler.drop_last
        and sampler.total_size != len(sampler.dataset)
    )


def _without_padding(loader: DataLoader[Any]) -> Any:
    """The loader without repeated samples; the ranks' lengths then differ by up to one sample.

    Raises:
        DataError: if some rank would have no batch.
    """
    padded: Any = loader.sampler
    samples, ranks = len(padded.dataset), padded.num_replicas
    needed = (loader.batch_size or 1) if loader.drop_last else 1
    if samples // ranks < needed:
        raise DataError(
            f"The evaluation data has {samples} sample(s) for {ranks} ranks. Every rank needs at"
            f" least {needed} (one batch): use fewer ranks, a smaller batch size, or more data."
        )
    arguments = {
        "num_replicas": padded.num_replicas,
        "rank": padded.rank,
        "shuffle": padded.shuffle,
        "seed": padded.seed,
    }
    sampler: Any
    loaded: Any = padded.dataset
    if type(padded) is DistributedSamplerWrapper:
        sampler = UnrepeatedDistributedSamplerWrapper(loaded._sampler, **arguments)
    else:
        sampler = UnrepeatedDistributedSampler(loaded, **arguments)
    return _update_dataloader(loader, sampler)


@contextmanager
def _nothing_logged(
    trainer: Any, loop: Any, batch: Any, dataloader_idx: int | None
) -> Iterator[None]:
    """Inside, ``self.log`` joins other ranks' reductions as usual, and its values are discarded."""
    kept, connector = loop._results, trainer._logger_connector
    current = connector._current_fx
    if kept is not None:
        loop._results = _ResultCollection(training=False)
        loop._results.batch, loop._results.dataloader_idx = batch, dataloader_idx
    try:
        yield
    finally:
        loop._results, connector._current_fx = kept, current
