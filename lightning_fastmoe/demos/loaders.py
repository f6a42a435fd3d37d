"""Loaders of the demos' data: one that resumes within an epoch, and one for evaluation."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

T = TypeVar("T")


def training_loader(
    datamodule: LightningDataModule,
    dataset: Dataset[T],
    batch_size: int,
    *,
    seed: int,
    num_workers: int,
) -> ResumableLoader[T]:
    """This rank's share of ``dataset``, shuffled and resumable.

    Args:
        datamodule: the data's module; without a Trainer it is all for one process.
        dataset: the training data, of known length.
        batch_size: samples per batch and rank.
        seed: the seed of the order; identical on all ranks.
        num_workers: processes that load data.
    """
    trainer = datamodule.trainer
    return ResumableLoader(
        dataset,
        batch_size,
        num_replicas=world_size(datamodule),
        rank=0 if trainer is None else trainer.global_rank,
        seed=seed,
        num_workers=num_workers,
    )


def world_size(datamodule: LightningDataModule) -> int:
    """The number of processes that share the data of a module."""
    return 1 if datamodule.trainer is None else datamodule.trainer.world_size


class ResumableLoader(DataLoader[T]):
    """Shuffled training batches of one rank, which a resumed run continues where the last stopped.

    Lightning restores its batch counter, but would restart the data: the resumed epoch would repeat
    its first batches and never reach its last ones. The position is counted in samples over all
    ranks, so it is valid on another number of ranks too.

    Args:
        dataset: the training data, of known length.
        batch_size: samples per batch and rank.
        num_replicas: world size.
        rank: this process's rank.
        seed: the seed of the order; identical on all ranks.
        num_workers: processes that load data.
    """

    def __init__(
        self,
        dataset: Dataset[T],
        batch_size: int,
        num_replicas: int,
        rank: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=_SkippingSampler(dataset, num_replicas, rank, seed=seed, drop_last=True),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            drop_last=True,
        )
        self._global_batch = batch_size * num_replicas
        self._done = 0
        self._resume_at = 0

    @override
    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        assert isinstance(self.sampler, _SkippingSampler)
        assert self.batch_size is not None
        self._done, self._resume_at = self._resume_at, 0
        self.sampler.skip = self._done * self.batch_size
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch, for a checkpoint."""
        return {"samples": self._done % len(self) * self._global_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Starts the next pass at the saved position; later passes are complete."""
        self._resume_at = state_dict["samples"] // self._global_batch % len(self)


class _SkippingSampler(DistributedSampler[int]):
    """Skips the first ``skip`` samples of this rank."""

    skip = 0

    @override
    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.skip, None)


def evaluation_loader(dataset: Dataset[T], batch_size: int, num_workers: int) -> DataLoader[T]:
    """Batches in the order of ``dataset``; the last may be smaller."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def no_loader() -> list[Any]:
    """What a data module without validation data returns, of which Lightning would warn."""
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    return []
