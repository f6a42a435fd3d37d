"""What the ranks run in test_loaders.py: loaders without a state, and where they go on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from strategy.models import Case, build_net, loss_of, make_optimizer
from strategy.tracing import make_trainer
from strategy.uneven_runs import Samples, sample
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

SAMPLES, EPOCHS, GLOBAL_BATCH = 16, 3, 4
BATCHES = SAMPLES // GLOBAL_BATCH


class Shuffled(IterableDataset[tuple[int, Tensor]]):
    """A stream that each rank and worker shuffles with the random numbers that it is given."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        own = torch.arange(self.rank, SAMPLES, self.world)[worker::workers]
        for n in own[torch.randperm(len(own))].tolist():
            yield n, sample(n)


class OwnLoop:
    """Any iterable will do; its order is drawn when it begins."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = (torch.randperm(BATCHES) + self.rank * BATCHES).tolist()
        return ([torch.tensor([n]), sample(n)[None]] for n in order)


def make_loader(kind: str, workers: int, rank: int, world: int) -> Any:
    """``kind``: "sampled" by Lightning, "random" on each rank, "stream", or "own"."""
    options: dict[str, Any] = {"batch_size": GLOBAL_BATCH // world, "num_workers": workers}
    if kind == "own":
        return OwnLoop(rank)
    if kind == "stream":
        return DataLoader(Shuffled(rank, world), **options)
    if kind == "persistent":
        options["persistent_workers"] = True
    return DataLoader(Samples(list(range(SAMPLES))), shuffle=True, **options)


class Noted(pl.LightningModule):
    """Notes the samples of each batch; draws random numbers in between, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_net((4, 8), (0.0, 0.0))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[0].tolist())
        torch.rand(7)
        return loss_of(self.net, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.net)


class SavesAt(pl.Callback):
    """Saves after so many batches, at their end, and where an epoch ends at its end."""

    def __init__(self, paths: dict[int, str]) -> None:
        self.paths, self.batches = paths, 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.batches += 1
        if self.batches in self.paths and self.batches % BATCHES:
            trainer.save_checkpoint(self.paths[self.batches])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.batches in self.paths:
            trainer.save_checkpoint(self.paths[self.batches])


def seen(
    kind: str, workers: int, world: int, paths: dict[int, str], resume: str | None = None
) -> tuple[list[list[int]], list[float]]:
    """The samples of each batch of this rank, and the last weights of a parameter."""
    pl.seed_everything(3, verbose=False)
    module = Noted()
    torch.rand(5 if resume else 0)  # a resumed run begins with other random numbers
    case = Case(world, world, 2, steps=-1, epochs=EPOCHS)
    trainer = make_trainer(
        case,
        callbacks=[SavesAt(paths)],
        max_epochs=EPOCHS,
        limit_train_batches=BATCHES,
        use_distributed_sampler=kind in ("sampled", "persistent"),
    )
    loader = make_loader(kind, workers, trainer.global_rank, world)
    trainer.fit(module, loader, ckpt_path=resume)
    return module.seen, module.net["head"].weight.flatten().tolist()


def straight_and_resumed(kind: str, workers: int, paths: dict[int, str]) -> Any:
    """An uninterrupted run on two ranks, and what comes of its checkpoints."""
    straight = seen(kind, workers, 2, paths)
    return straight, {n: seen(kind, workers, 2, {}, path) for n, path in paths.items()}


def resumed_twice(workers: int, path: str, again: str) -> Any:
    """Saves after 5 batches, and from there again after 2 more."""
    straight = seen("sampled", workers, 2, {5: path})
    seen("sampled", workers, 2, {2: again}, path)
    return straight, seen("sampled", workers, 2, {}, again)


def ended_midway(path: str) -> Any:
    """The samples of a whole run, and of one from a checkpoint of a fit that max_steps ended."""
    straight, _ = seen("sampled", 0, 2, {})
    pl.seed_everything(3, verbose=False)
    trainer = make_trainer(
        Case(2, 2, 2, steps=BATCHES + 1),
        limit_train_batches=BATCHES,
        use_distributed_sampler=True,
    )
    trainer.fit(Noted(), make_loader("sampled", 0, trainer.global_rank, 2))
    trainer.save_checkpoint(path)
    return straight, seen("sampled", 0, 2, {}, path)[0]


class Several(Noted):
    """Takes the batches of several loaders, some of which may have ended."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = list(batch.values()) if isinstance(batch, dict) else [batch]
        batches = [one for one in batches if one is not None]
        self.seen.append([one[0].tolist() for one in batches])
        torch.rand(7)
        return sum((loss_of(self.net, one[1]) for one in batches), torch.zeros(()))


class ReloadedData(pl.LightningDataModule):
    """Makes its loader anew in each epoch."""

    def train_dataloader(self) -> Any:
        return _shuffled(SAMPLES)


def _shuffled(samples: int) -> Any:
    return DataLoader(Samples(list(range(samples))), shuffle=True, batch_size=GLOBAL_BATCH)


def _pair() -> dict[str, Any]:
    return {"a": _shuffled(SAMPLES), "b": _shuffled(SAMPLES // 2)}


COMBINED: dict[str, tuple[Any, dict[str, Any]]] = {
    "dict": (lambda: {"a": _shuffled(SAMPLES), "b": _shuffled(SAMPLES)}, {}),
    "max_size": (lambda: CombinedLoader(_pair(), "max_size"), {}),
    "max_size_cycle": (lambda: CombinedLoader(_pair(), "max_size_cycle"), {}),
    "reloaded": (ReloadedData, {"reload_dataloaders_every_n_epochs": 1}),
    "accumulated": (lambda: _shuffled(SAMPLES), {"accumulate_grad_batches": 2}),
    "overfit": (lambda: _shuffled(SAMPLES), {"overfit_batches": 3}),
    "limited": (lambda: _shuffled(SAMPLES), {"limit_train_batches": 3}),
}
"""Other ways to give a Trainer its data, with the options that go with them."""


def combined(kind: str, path: str, resume: bool) -> tuple[list[list[int]], list[float]]:
    """What one rank sees; it saves after five batches, or goes on from there."""
    pl.seed_everything(3, verbose=False)
    module = Several()
    torch.rand(5 if resume else 0)
    make, options = COMBINED[kind]
    trainer = make_trainer(
        Case(1, 1, 2, steps=-1, epochs=EPOCHS),
        callbacks=[SavesAt({} if resume else {5: path})],
        **{"max_epochs": EPOCHS, "use_distributed_sampler": False, **options},
    )
    trainer.fit(module, make(), ckpt_path=path if resume else None)
    return module.seen, module.net["head"].weight.flatten().tolist()


def with_workers(directory: str) -> None:
    """On ranks that may start processes, which those of a pool may not; writes what it finds."""
    found = {}
    for kind in ("sampled", "persistent", "random"):
        paths = {n: f"{directory}/{kind}{n}.ckpt" for n in (4, 6)}
        found[kind] = straight_and_resumed(kind, 2, paths)
    Path(directory, f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with_workers(sys.argv[1])
