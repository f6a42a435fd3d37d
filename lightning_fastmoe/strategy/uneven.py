"""Ranks with different numbers of batches.

Every forward pass exchanges tokens between ranks, so all ranks must run equally many. The rules:

- fit stops together: an epoch has as many steps as the rank with the fewest batches;
- validation, testing and prediction count each sample once: a rank with fewer batches runs extra
  steps for the sake of the others on a batch of its own, and nothing of them is kept.

The extra steps for a loader lie between its first and its last own step, so that what Lightning and
torchmetrics reduce at the end of each loader is reduced at the same point on all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from pytorch_lightning.overrides.distributed import (
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from pytorch_lightning.trainer import call
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection
from pytorch_lightning.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler

from lightning_fastmoe.errors import DataError
from lightning_fastmoe.strategy.untouched import untouched

if TYPE_CHECKING:
    from lightning_fastmoe.strategy.fastmoe import FastMoEStrategy

_NO_LENGTH = -1


class UnevenData:
    """Keeps the ranks in step; one object per strategy.

    Args:
        strategy: whose trainer, ranks and steps these are.
    """

    def __init__(self, strategy: FastMoEStrategy) -> None:
        self.strategy = strategy
        self._step = ""

    @property
    def _trainer(self) -> Any:
        module = self.strategy.lightning_module
        assert module is not None
        return module.trainer

    def wrap(self, dataloader: object) -> object:
        """Returns the loader itself if all ranks have equally many batches, else a wrapper.

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
            return SizedLoader(dataloader, self, min(lengths))
        return dataloader

    def trains_on(self, loader: object) -> bool:
        """Whether ``loader`` is (part of) the training data, as opposed to evaluation data."""
        combined = self._trainer.fit_loop._combined_loader
        return combined is not None and any(item is loader for item in combined.flattened)

    def agree(self, has_batch: bool) -> list[bool]:
        """Which ranks have another batch."""
        return [bool(flag) for flag in self._gather(int(has_batch))]

    def fill_up(self, step: str) -> None:
        """Before an evaluation: finds how many extra steps each loader of known length needs here.

        Args:
            step: "validation_step", "test_step" or "predict_step".

        Raises:
            DataError: on all ranks, if they are needed beside a loader of unknown length.
        """
        if self.strategy.world_size == 1:
            return
        self._step = step
        loop = self._evaluation_loop()
        own = [_NO_LENGTH if math.isinf(n) else int(n) for n in loop.max_batches]
        table = self._gather_lists(own)
        loaders = loop._combined_loader.flattened
        # With these Lightning fetches ahead of the steps, or several batches for one step.
        ahead = loop._combined_loader._mode != "sequential" or any(
            isinstance(loader, UnsizedLoader) for loader in loaders
        )
        for index, loader in enumerate(loaders):
            if not isinstance(loader, SizedLoader):
                continue
            lengths = [row[index] for row in table]
            loader.extra_steps = max(lengths) - own[index]
            if ahead and min(lengths) != max(lengths):
                raise DataError(
                    f"Evaluation loader {index} has {lengths} batches on the ranks, beside a loader"
                    " of unknown length or in a CombinedLoader that is not sequential. Give the"
                    " ranks equally many batches, or evaluate the loaders one after the other."
                )

    @torch.no_grad()
    def extra_step(self, loader: object, batch: Any) -> None:
        """Runs an evaluation step for the other ranks' sake and forgets all that it did."""
        trainer, module = self._trainer, self.strategy.lightning_module
        loop = self._evaluation_loop()
        loaders = loop._combined_loader.flattened
        index = next(i for i, item in enumerate(loaders) if item is loader)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=index)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=index)
        kwargs = loop._build_kwargs(batch, 0, index if len(loaders) > 1 else None)
        arguments = loop._build_step_args_from_hook_kwargs(kwargs, self._step)
        with _nothing_logged(trainer, loop, batch, kwargs.get("dataloader_idx")), untouched(module):
            call._call_strategy_hook(trainer, self._step, *arguments)

    def batch_limit(self, loader: object) -> float:
        """The number of batches at which the running loop stops by itself."""
        trainer = self._trainer
        if self.trains_on(loader):
            limit = trainer.limit_train_batches
        elif trainer.predicting:
            limit = trainer.limit_predict_batches
        else:
            limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
            if trainer.sanity_checking:
                limit = min(
                    limit if isinstance(limit, int) else math.inf, trainer.num_sanity_val_steps
                )
        return limit if isinstance(limit, int) else math.inf

    def _evaluation_loop(self) -> Any:
        trainer = self._trainer
        return trainer.predict_loop if trainer.predicting else trainer._evaluation_loop

    def _gather(self, value: int) -> list[int]:
        return [row[0] for row in self._gather_lists([value])]

    def _gather_lists(self, values: list[int]) -> list[list[int]]:
        own = torch.tensor(values, dtype=torch.int64, device=self.strategy.root_device)
        table = own.new_empty((dist.get_world_size(), len(values)))
        dist.all_gather(list(table.unbind()), own)
        return table.tolist()  # type: ignore[no-any-return]


class _Loader:
    """Looks like the loader that it wraps."""

    def __init__(self, loader: Any, uneven: UnevenData) -> None:
        self._loader = loader
        self._uneven = uneven

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_uneven"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class SizedLoader(_Loader):
    """A loader of known length: cut to the shortest rank's in training, whole in evaluation.

    Lightning's sampler repeats samples to give all ranks equally many; in evaluation that would
    count them twice, so there the loader reads each sample once.

    Attributes:
        extra_steps: evaluation steps to run here for the other ranks' sake.
    """

    def __init__(self, loader: Any, uneven: UnevenData, shortest: int) -> None:
        super().__init__(loader, uneven)
        self._shortest = shortest
        self._once: Any = None
        self.extra_steps = 0

    def __len__(self) -> int:
        return self._shortest if self._uneven.trains_on(self) else len(self._each_once())

    def __iter__(self) -> Iterator[Any]:
        if self._uneven.trains_on(self):
            return itertools.islice(self._loader, self._shortest)
        return self._evaluate()

    def _evaluate(self) -> Iterator[Any]:
        for i, batch in enumerate(self._each_once()):
            if i == 0:
                for _ in range(self.extra_steps):
                    self._uneven.extra_step(self, batch)
            yield batch

    def _each_once(self) -> Any:
        if self._once is None:
            self._once = _without_padding(self._loader) if _pads(self._loader) else self._loader
        return self._once


class UnsizedLoader(_Loader):
    """A loader of unknown length; before each batch the ranks agree who has another one."""

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
            if exhausted:
                uneven.extra_step(self, last)
            else:
                last = batch
                yield batch
            seen += 1


def _next(iterator: Iterator[Any]) -> tuple[Any, bool]:
    try:
        return next(iterator), False
    except StopIteration:
        return None, True


def _length(loader: Any) -> int:
    length = sized_len(loader)
    return _NO_LENGTH if length is None else length


def _pads(loader: Any) -> bool:
    """Whether the loader's sampler repeats samples to give every rank equally many."""
    sampler = getattr(loader, "sampler", None)
    return (
        type(sampler) in (DistributedSampler, DistributedSamplerWrapper)
        and not sampler.drop_last
        and sampler.total_size != len(sampler.dataset)
    )


def _without_padding(loader: DataLoader[Any]) -> Any:
    """The same loader, each sample once; the ranks' lengths then differ by up to one sample.

    Raises:
        DataError: if there are fewer samples than ranks.
    """
    padded: Any = loader.sampler
    if len(padded.dataset) < padded.num_replicas:
        raise DataError(
            f"The evaluation data has {len(padded.dataset)} sample(s) for {padded.num_replicas}"
            " ranks. Every rank needs at least one: use fewer ranks or more data."
        )
    arguments = {
        "num_replicas": padded.num_replicas,
        "rank": padded.rank,
        "shuffle": padded.shuffle,
        "seed": padded.seed,
    }
    if isinstance(padded, DistributedSamplerWrapper):
        sampler = UnrepeatedDistributedSamplerWrapper(padded.dataset._sampler, **arguments)
    else:
        sampler = UnrepeatedDistributedSampler(padded.dataset, **arguments)
    return _update_dataloader(loader, sampler)


@contextmanager
def _nothing_logged(
    trainer: Any, loop: Any, batch: Any, dataloader_idx: int | None
) -> Iterator[None]:
    """Inside, ``self.log`` works as ever, joins other ranks' reductions, and is then forgotten."""
    kept, connector = loop._results, trainer._logger_connector
    current = connector._current_fx
    if kept is not None:
        loop._results = _ResultCollection(training=False)
        loop._results.batch, loop._results.dataloader_idx = batch, dataloader_idx
    try:
        yield
    finally:
        loop._results, connector._current_fx = kept, current
