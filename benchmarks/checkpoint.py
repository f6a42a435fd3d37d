"""Checkpoint benchmark: time and peak memory, against DeepSpeed, DCP and ``torch.save``.

    python benchmarks/checkpoint.py --sizes 1 4 --ranks 1 2 4

Ranks are processes on this machine, without GPUs, connected by gloo. Each trains a dense model for
one step (DeepSpeed can save only its own experts) under ``FastMoEStrategy(stage=2)`` in fp32, so
that weights and AdamW's states, 12 bytes per parameter, are partitioned over the ranks. Then the
same state of the same engine is saved and loaded in turn by

    fastmoe      trainer.save_checkpoint, strategy.load_checkpoint: one checkpoint for any ranks
    deepspeed    engine.save_checkpoint, engine.load_checkpoint: one for as many ranks
    dcp          torch.distributed.checkpoint, partitions as DTensors
    torch        torch.save and torch.load of each rank's partitions, a file for each rank

Times are those of the slowest rank, in seconds: `save` until the call returns; `durable` until all
bytes are on the disk (`torch` and `deepspeed` return before that); `load` with the files evicted
from the page cache. `peak` is the maximum increase of a rank's resident memory. `unhashed` and
`unverified` are fastmoe's times without hashing, measured alternately before and after the others;
`cpu` is the CPU time of all ranks: divided by the number of cores, it is a lower bound of the time,
however fast the disk is. The stall of --async is how long the second of two background saves blocks
training.

Files are written below --directory, which needs space for twice the largest size, and deleted
afterwards. Prints a table, or with --json one object per line, for each size and number of ranks.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from saving.systems import KINDS
from saving.worker import GIB, run

from lightning_fastmoe.testing import RankPool


def measure(size: float, ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one size on a number of ranks: system -> metric -> median over the repeats."""
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
    parser.add_argument("--systems", nargs="+", choices=list(KINDS), default=list(KINDS))
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
    # When terminated, it still ends its ranks and deletes its files.
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
