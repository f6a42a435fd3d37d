"""Saving and loading: time and peak memory, against DeepSpeed's own, DCP and ``torch.save``.

    python benchmarks/checkpoint.py --sizes 1 4 --ranks 1 2 4

Ranks are processes on this machine, without GPUs, and gloo between them. Each trains one step of a
plain model (DeepSpeed's own saving knows no experts but its own) under ``FastMoEStrategy(stage=2)``
in fp32, so that weights and AdamW's states, 12 bytes for each parameter, lie partitioned over the
ranks. Then the same state of the same engine is saved and loaded by

    fastmoe      trainer.save_checkpoint, strategy.load_checkpoint: one checkpoint for any ranks
    deepspeed    engine.save_checkpoint, engine.load_checkpoint: one for as many ranks
    dcp          torch.distributed.checkpoint, partitions as DTensors
    torch        torch.save and torch.load of each rank's partitions, a file for each rank

in turn. Times are of the slowest rank, in seconds: `save` until the call returns; `durable` until
every byte is on the disk, too (the call does not wait for that in `torch` and `deepspeed`); `load`
with the page cache emptied of the files. `peak` is how far the resident memory of a rank rose above
what it was, at most. `unhashed` and `unverified` are fastmoe's times without hashing, taken before
and after the others by turns; `cpu` is what all ranks' processors did meanwhile: divided by the
cores, it bounds the time from below, however fast the disk is. The stall of --async is how long the
second of two saves in the background keeps training waiting.

Files go below --directory, which needs room for twice the largest size; they are deleted. Prints a
table, or with --json a line with one object, for each size and number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.checkpoint import stream
from lightning_fastmoe.testing import RankPool

SYSTEMS = ("fastmoe", "deepspeed", "dcp", "torch")
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


# --------------------------------------------------------------------------------------- measuring


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def files_below(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def to_disk(path: Path, *, forget: bool = False) -> None:
    """Waits until files are on the disk, and takes them out of the page cache if told to."""
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        if forget:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Meter:
    """Times of the slowest rank, and the largest rise of memory.

    Attributes:
        cpu: seconds of all ranks' processors in the last measurement.
    """

    cpu = 0.0

    def measure(self, action: Callable[[], Any], after: Callable[[], Any] | None = None) -> Any:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is needed
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM begins anew
        before = resident("VmRSS")
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        action()
        times = [time.perf_counter() - start]
        cpu = time.process_time() - cpu
        peak = resident("VmHWM") - before
        dist.barrier()
        if after is not None:
            after()
            times.append(time.perf_counter() - start)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (times, peak, cpu))
        slowest = [max(own[i] for own, *_ in everybody) for i in range(len(times))]
        self.cpu = sum(cpu for *_, cpu in everybody)
        return slowest, max(peak for _, peak, _ in everybody)


# ------------------------------------------------------------------------------------- the systems


class System:
    """Something that saves a state to a directory and loads it from there."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.engine = trainer, trainer.strategy.deepspeed_engine

    def save(self, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path) -> None:
        raise NotImplementedError

    def partitions(self) -> dict[str, Tensor]:
        """This rank's part of weights and optimizer states."""
        zero = self.engine.optimizer
        result = {}
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            result[f"{i}.weights"] = master.detach()
            for name, value in zero.optimizer.state[master].items():
                if value.dim():
                    result[f"{i}.{name}"] = value
        return result


class FastMoE(System):
    def save(self, path: Path) -> None:
        self.trainer.save_checkpoint(str(path / "a.ckpt"))

    def load(self, path: Path) -> None:
        self.trainer.strategy.load_checkpoint(str(path / "a.ckpt"))


class DeepSpeed(System):
    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(str(path), tag="a")

    def load(self, path: Path) -> None:
        # The engine's own checks for Lightning's directories are no part of what is measured.
        loaded, _ = self.engine.load_checkpoint(str(path), tag="a")
        if loaded is None:
            raise RuntimeError("DeepSpeed found no checkpoint")


class DCP(System):
    def state(self) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {n: DTensor.from_local(t, mesh, [Shard(0)]) for n, t in self.partitions().items()}

    def save(self, path: Path) -> None:
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        dcp.load(self.state(), checkpoint_id=path)


class Torch(System):
    def file(self, path: Path) -> Path:
        return path / f"{dist.get_rank()}.pt"

    def save(self, path: Path) -> None:
        torch.save(self.partitions(), self.file(path))

    def load(self, path: Path) -> None:
        loaded = torch.load(self.file(path), weights_only=True)
        for name, target in self.partitions().items():
            target.copy_(loaded[name])


KINDS = {"fastmoe": FastMoE, "deepspeed": DeepSpeed, "dcp": DCP, "torch": Torch}


# -------------------------------------------------------------------------------------- what is run


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
        self.note("state", "bytes", sum(t.nbytes for t in System(trainer).partitions().values()))
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
        with emptied(path), mock.patch.object(stream.hashlib, "sha256", NoHash):
            (save,), _ = meter.measure(lambda: system.save(path))
        self.note("fastmoe", "unhashed", save)
        self.note("fastmoe", "unhashed_cpu", meter.cpu)

    def stall(self, system: System, path: Path, meter: Meter) -> None:
        """The second save in a row: the first allocates the copy, which is kept."""
        strategy = system.trainer.strategy
        with mock.patch.multiple(strategy, async_checkpoint=True, _made_writer=None):
            for _ in range(2):
                with emptied(path):
                    (stall, _), _ = meter.measure(
                        lambda: system.save(path), lambda: strategy._made_writer.wait()
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
    """What each rank runs."""
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


def measure(size: float, ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One size on so many ranks: name -> what -> the median of all turns."""
    directory = tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=arguments.directory)
    pool = RankPool()
    try:
        results = pool.run(
            run,
            ranks,
            size,
            directory,
            arguments.systems,
            arguments.repeat,
            arguments.asynchronous,
            timeout=1800.0,
        )
    finally:
        pool.close()
        shutil.rmtree(directory, ignore_errors=True)
    state = sum(result.pop("state")["bytes"][0] for result in results)
    middle = {
        name: {what: statistics.median(values) for what, values in own.items()}
        for name, own in results[0].items()
    }
    return {"ranks": ranks, "size_gib": state / GIB, "systems": middle}


# --------------------------------------------------------------------------------------- reporting


def versions() -> dict[str, str]:
    import deepspeed

    found = {m.__name__: m.__version__ for m in (torch, pl, deepspeed)}
    return {"python": platform.python_version(), **found, "machine": platform.machine()}


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    yield f"\n{result['size_gib']:.2f} GiB of state, ranks: {result['ranks']}"
    yield f"{'':12}{'save':>8}{'durable':>9}{'peak':>10}{'load':>8}{'peak':>10}{'files':>10}"
    for name, m in result["systems"].items():
        yield (
            f"{name:12}{m['save']:8.2f}{m['durable']:9.2f}{m['save_peak'] / 2**20:7.0f} MB"
            f"{m['load']:8.2f}{m['load_peak'] / 2**20:7.0f} MB{m['files_bytes'] / GIB:7.2f} GB"
        )
    own = result["systems"].get("fastmoe")
    if own:
        yield (
            f"fastmoe without hashing: save {own['unhashed']:.2f} (ratio"
            f" {own['save'] / own['unhashed']:.2f}), load {own['unverified']:.2f};"
            f" cpu {own['save_cpu']:.2f} and without {own['unhashed_cpu']:.2f}"
        )
        if "async_stall" in own:
            share = own["async_stall"] / own["save"]
            yield f"fastmoe, async: stall {own['async_stall']:.2f} ({share:.0%} of a save)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1.0, 4.0], metavar="GIB", help="of the state"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeat", type=int, default=1, help="turns; medians are reported")
    parser.add_argument(
        "--async",
        dest="asynchronous",
        action="store_true",
        help="also measure how long training waits with async_checkpoint=True",
    )
    parser.add_argument("--directory", type=Path, default=None, help="where files go")
    parser.add_argument("--json", action="store_true", help="print JSON, an object on each line")
    arguments = parser.parse_args()
    room = shutil.disk_usage(arguments.directory or tempfile.gettempdir()).free
    if room < 2 * max(arguments.sizes) * GIB:
        sys.exit(f"error: only {room / GIB:.1f} GiB are free; choose --directory or --sizes")
    # Told to stop, it still ends its ranks and deletes its files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for size in arguments.sizes:
        for ranks in arguments.ranks:
            result = {**measure(size, ranks, arguments), "versions": versions()}
            text = json.dumps(result) if arguments.json else "\n".join(lines_of(result))
            print(text, flush=True)
    if not arguments.json:
        print("\n" + ", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main()
