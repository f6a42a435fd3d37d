"""Saves by two ranks, one of which is killed at a chosen moment. Run by test_kill.py.

One process imports everything once and forks the ranks of each trial. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint.samples import fragments_of, make_manifest, make_tensors, small_files, write_sample

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.format import files, publish, safetensors_stream
from lightning_fastmoe.checkpoint.save import Snapshot, write
from lightning_fastmoe.errors import CheckpointError

RANKS = 2
HEAD = "weights/head.weight"
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


class Countdown:
    """Kills this process at its n-th step on the file system."""

    def __init__(self, at: int | None, number: int) -> None:
        self.at, self.number, self.steps = at, number, 0

    def step(self) -> None:
        if self.steps == self.at:
            os.kill(os.getpid(), self.number)
            time.sleep(5)
        self.steps += 1

    def watch(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return function(*args, **kwargs)

        setattr(owner, name, watched)


def save(path: Path, seed: int, rank: int, store: str, countdown: Countdown) -> None:
    """What a rank does."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    snapshot = Snapshot(fragments_of(make_tensors(seed), RANKS)[rank], small_files(rank))
    if rank == 0:
        snapshot.manifest = make_manifest()
    for owner, name in (
        (os, "mkdir"),
        (os, "fsync"),
        (os, "rename"),
        (os, "open"),
        (os, "unlink"),
        (os, "rmdir"),
        (publish, "exchange"),
        (safetensors_stream.files, "write_all"),
        (files, "create"),
    ):
        countdown.watch(owner, name)
    write(path, snapshot)


def fork(function: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        function()
        code = 0
    except CheckpointError:
        code = 3
    finally:
        os._exit(code)


def trial(path: Path, seed: int, victim: int, at: int | None, how: str, steps: Path) -> list[int]:
    """Exit codes of the ranks, negative where a signal ended one; -999 for a hang."""
    store = str(path.parent.parent / f"store-{victim}-{at}-{how}-{time.monotonic_ns()}")

    def child(rank: int) -> None:
        countdown = Countdown(at if rank == victim else None, SIGNALS[how])
        try:
            save(path, seed, rank, store, countdown)
        finally:
            (steps / str(rank)).write_text(str(countdown.steps))

    pids = [fork(lambda rank=rank: child(rank)) for rank in range(RANKS)]
    return [wait(pid) for pid in pids]


def wait(pid: int) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999


def seed_of(path: Path, seeds: range) -> int | str:
    """Which sample the checkpoint holds, every byte of it."""
    try:
        with CheckpointReader(path) as reader:
            reader.verify()
            for seed in seeds:
                if all(torch.equal(reader.read(n), t) for n, t in make_tensors(seed).items()):
                    return seed
        return "a mixture"
    except CheckpointError as error:
        return str(error)


def main(directory: Path, how: str, exchange: bool, stride: int) -> dict[str, Any]:
    os.fsync = lambda fd: None  # processes die here, not the machine
    if not exchange:
        publish.exchange = lambda a, b: False
    path = directory / "checkpoints" / "last.ckpt"
    write_sample(path, make_tensors(0))
    trial(path, 1, 0, None, how, directory)
    totals = [int((directory / str(rank)).read_text()) for rank in range(RANKS)]
    result: dict[str, Any] = {"steps": totals, "clean": seed_of(path, range(2)), "trials": []}
    for victim in range(RANKS):
        steps = range(victim % stride, totals[victim], stride)
        if not exchange:  # up to there nothing differs
            steps = range(totals[0] // 2 if victim == 0 else totals[1], totals[victim])
        for at in steps:
            write_sample(path, make_tensors(0))
            publish.remove(path.parent / "other.ckpt")
            codes = trial(path, 1, victim, at, how, directory)
            found = seed_of(path, range(2))
            offered = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
            write_sample(path.parent / "other.ckpt", make_tensors(2))
            after = seed_of(path, range(2))
            left = sorted(p.name for p in path.parent.iterdir())
            row = [victim, at, codes, found, offered, after, left]
            result["trials"].append(row)
    return result


if __name__ == "__main__":
    way = sys.argv[2:]
    print(json.dumps(main(Path(sys.argv[1]), way[0], way[1] == "exchange", int(way[2]))))
