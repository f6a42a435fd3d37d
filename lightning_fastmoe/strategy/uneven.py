"""Ranks with different numbers of batches.

Every forward pass exchanges tokens between ranks, so all ranks must run equally many. The rules:

- fit stops together: an epoch has as many steps as the rank with the fewest batches;
- validation, testing and prediction count each sample once: a rank with fewer batches runs extra
  steps for the sake of the others on a batch of its own, and nothing of them is kept.
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
from pytorch_lightning.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric

from lightning_fastmoe.errors import DataError

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
        """Runs this rank's extra evaluation steps for loaders of known length, before its own.

        Args:
            step: "validation_step", "test_step" or "predict_step".
        """
        if self.strategy.world_size == 1:
            return
        loop = self._evaluation_loop()
        own = [_NO_LENGTH if math.isinf(n) else int(n) for n in loop.max_batches]
        table = self._gather_lists(own)
        for index, loader in enumerate(loop._combined_loader.flattened):
            if isinstance(loader, UnsizedLoader):
                continue
            missing = max(row[index] for row in table) - own[index]
            if missing:
                batch = self._first_batch(loader)
                for _ in range(missing):
                    self.extra_step(step, batch, index)

    @torch.no_grad()
    def extra_step(self, step: str, batch: Any, dataloader_idx: int) -> None:
        """Runs an evaluation step for the other ranks' sake and forgets all that it did."""
        trainer, module = self._trainer, self.strategy.lightning_module
        loop = self._evaluation_loop()
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        batch = call._call_strategy_hook(
            trainer, "batch_to_device", batch, dataloader_idx=dataloader_idx
        )
        several = len(loop._combined_loader.flattened) > 1
        kwargs = loop._build_kwargs(batch, 0, dataloader_idx if several else None)
        arguments = (
            tuple(kwargs.values())
            if step == "predict_step"
            else loop._build_step_args_from_hook_kwargs(kwargs, step)
        )
        with _nothing_logged(module, self.strategy), _metrics_untouched(module):
            call._call_strategy_hook(trainer, step, *arguments)

    def evaluation_step_name(self) -> str:
        """The step that the running evaluation calls."""
        if self._trainer.predicting:
            return "predict_step"
        return "test_step" if self._trainer.testing else "validation_step"

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
                limit = min(limit if isinstance(limit, int) else math.inf, trainer.num_sanity_val_steps)
        return limit if isinstance(limit, int) else math.inf

    def _evaluation_loop(self) -> Any:
        trainer = self._trainer
        return trainer.predict_loop if trainer.predicting else trainer._evaluation_loop

    def _first_batch(self, loader: Any) -> Any:
        state = torch.get_rng_state()  # a loader's iterator draws a base seed
        try:
            return next(iter(loader))
        finally:
            torch.set_rng_state(state)

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
    """

    def __init__(self, loader: Any, uneven: UnevenData, shortest: int) -> None:
        super().__init__(loader, uneven)
        self._shortest = shortest
        self._once: Any = None

    def __len__(self) -> int:
        return self._shortest if self._uneven.trains_on(self) else len(self._each_once())

    def __iter__(self) -> Iterator[Any]:
        if self._uneven.trains_on(self):
            return itertools.islice(self._loader, self._shortest)
        return iter(self._each_once())

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
            if not any(flags) or (training and not all(flags)):
                return
            if not exhausted:
                last = batch
                yield batch
            elif seen == 0:
                raise DataError(
                    "This rank's data has no batch, but another rank's has. Every rank needs at"
                    " least one batch: use fewer ranks or more data."
                )
            else:
                uneven.extra_step(uneven.evaluation_step_name(), last, 0)
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
def _nothing_logged(module: Any, strategy: FastMoEStrategy) -> Iterator[None]:
    """Inside, ``self.log`` keeps nothing, but joins the reductions that other ranks wait in."""

    def log(
        name: str, value: Any, on_step: bool | None = None, sync_dist: bool = False, **kwargs: Any
    ) -> None:
        if on_step and sync_dist and not isinstance(value, Metric):
            tensor = torch.as_tensor(value, device=strategy.root_device, dtype=torch.float32)
            strategy.reduce(tensor, reduce_op=kwargs.get("reduce_fx", "mean"))

    module.__dict__["log"] = log
    try:
        yield
    finally:
        del module.__dict__["log"]


@contextmanager
def _metrics_untouched(module: torch.nn.Module) -> Iterator[None]:
    """Restores the state of every torchmetrics metric at the end."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    saved = [(m, m._copy_state_dict(), m._update_count, m._computed) for m in metrics]
    try:
        yield
    finally:
        for metric, state, count, computed in saved:
            for key, value in state.items():
                setattr(metric, key, value)
            metric._update_count, metric._computed = count, computed
