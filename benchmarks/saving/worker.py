"""What each rank runs: trains one step, then measures all systems in turn."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.checkpoint.format import safetensors_stream
from saving.meter import Meter, files_below, to_disk
from saving.systems import KINDS, System, partitions

WIDTH = 2048
BYTES_PER_PARAMETER = 12
GIB = 2**30


class Stack(pl.LightningModule):
    """As many square matrices as make up the size."""

    def __init__(self, size: float) -> None:
        super().__init__()
        count = max(1, round(size * GIB / BYTES_PER_PARAMETER / WIDTH**2))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = batch + layer(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class NoHash:
    """Stands in for SHA-256, to see what hashing costs."""

    def __init__(self, data: bytes = b"") -> None:
        pass

    def update(self, data: bytes) -> None:
        pass

    def copy(self) -> NoHash:
        return self

    def hexdigest(self) -> str:
        return "0" * 64


class Benchmark(pl.Callback):
    """Measures all systems once the state exists."""

    def __init__(
        self, directory: Path, systems: list[str], repeat: int, asynchronous: bool
    ) -> None:
        self.directory, self.systems, self.repeat = directory, systems, repeat
        self.asynchronous, self.turn = asynchronous, 0
        self.results: dict[str, dict[str, list[float]]] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        systems = {name: KINDS[name](trainer) for name in self.systems}
        state = partitions(trainer.strategy.deepspeed_engine)
        self.note("state", "bytes", sum(t.nbytes for t in state.values()))
        with emptied(self.directory / "first"):  # what is done once only is not measured
            next(iter(systems.values())).save(self.directory / "first")
        for _ in range(self.repeat):
            for name, system in systems.items():
                self.one_turn(name, system)
            self.turn += 1

    def note(self, name: str, what: str, value: float) -> None:
        self.results.setdefault(name, {}).setdefault(what, []).append(value)

    def one_turn(self, name: str, system: System) -> None:
        note, meter = self.note, Meter()
        path = self.directory / name
        if name == "fastmoe" and self.turn % 2:
            self.unhashed(system, path, meter)
        with emptied(path):
            (save, durable), peak = meter.measure(lambda: system.save(path), lambda: to_disk(path))
            note(name, "save", save)
            note(name, "save_cpu", meter.cpu)
            note(name, "durable", durable)
            note(name, "save_peak", peak)
            note(name, "files_bytes", sum(f.stat().st_size for f in files_below(path)))
            if name == "fastmoe" and self.turn % 2:
                self.unverified(system, path, meter)
            to_disk(path, forget=True)
            dist.barrier()
            (load,), peak = meter.measure(lambda: system.load(path))
            note(name, "load", load)
            note(name, "load_peak", peak)
            if name == "fastmoe" and not self.turn % 2:
                self.unverified(system, path, meter)
        if name == "fastmoe" and not self.turn % 2:
            self.unhashed(system, path, meter)
        if name == "fastmoe" and self.asynchronous:
            self.stall(system, path, meter)

    def unverified(self, system: System, path: Path, meter: Meter) -> None:
        to_disk(path, forget=True)
        dist.barrier()
        with mock.patch.object(system.trainer.strategy, "verify_checkpoints", False):
            (load,), _ = meter.measure(lambda: system.load(path))
        self.note("fastmoe", "unverified", load)

    def unhashed(self, system: System, path: Path, meter: Meter) -> None:
        with emptied(path), mock.patch.object(safetensors_stream.hashlib, "sha256", NoHash):
            (save,), _ = meter.measure(lambda: system.save(path))
        self.note("fastmoe", "unhashed", save)
        self.note("fastmoe", "unhashed_cpu", meter.cpu)

    def stall(self, system: System, path: Path, meter: Meter) -> None:
        """The second save in a row: the first allocates the copy, which is kept."""
        strategy = system.trainer.strategy
        with mock.patch.multiple(strategy._saving, _in_background=True, _made_writer=None):
            for _ in range(2):
                with emptied(path):
                    (stall, _), _ = meter.measure(
                        lambda: system.save(path), lambda: strategy._saving.wait()
                    )
        self.note("fastmoe", "async_stall", stall)


@contextlib.contextmanager
def emptied(path: Path) -> Iterator[None]:
    """A new directory for all ranks, deleted in the end."""
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path)
    dist.barrier()


def run(
    size: float, directory: str, systems: list[str], repeat: int, asynchronous: bool
) -> dict[str, Any]:
    """Name -> what -> one value for each turn, of the slowest rank."""
    warnings.filterwarnings("ignore")
    for logger in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.manual_seed(0)
    world = int(os.environ["WORLD_SIZE"])
    benchmark = Benchmark(Path(directory), systems, repeat, asynchronous)
    strategy = FastMoEStrategy(
        1, stage=2, reduce_bucket_size=WIDTH**2, allgather_bucket_size=WIDTH**2
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_steps=1,
        callbacks=[benchmark],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Stack(size), DataLoader([torch.randn(1, WIDTH)], batch_size=None))
    return benchmark.results
