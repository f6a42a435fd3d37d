"""Measures what an exchange of tokens through symmetric memory is made of.

    torchrun --nproc-per-node 2 benchmarks/exchange.py
    torchrun --nproc-per-node 4 benchmarks/exchange.py --json run.json

- Bytes per second of one rank's pushes to all others, by row size, for loads and stores by the
  whole device and for bulk copies by some thread blocks. All ranks push at once, so each link
  carries as much in the other direction. "aside" is a copy of the same bytes by the copy engine.
- Microseconds of an exchange without rows: a flag of this rank in all others, and the wait for
  theirs.

Times are of the slowest rank, by CUDA events around --repeats of the same, the median of --rounds.
What is pushed is compared with what was sent before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_fastmoe.distributed.symmetric.memory import SymmetricMemory, check_reachable
from lightning_fastmoe.ops import exchange

MEGABYTES = 64
ROW_BYTES = (2048, 4096, 8192, 14336)
BULK_BLOCKS = (0, 4, 8, 16, 32, 66, 132)


def timed(work: Callable[[], None], args: argparse.Namespace) -> float:
    """Milliseconds of one call on the slowest rank."""
    times = []
    for _ in range(args.rounds + 1):
        torch.cuda.synchronize()
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(args.repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor([start.elapsed_time(end) / args.repeats], device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(slowest.item())
    return statistics.median(times[1:])


def pushes(row_bytes: int, args: argparse.Namespace) -> dict[str, float]:
    """GB/s by way of pushing."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = (MEGABYTES << 20) // row_bytes
    memory = SymmetricMemory(
        dist.group.WORLD, ranks * count * row_bytes, torch.device("cuda", rank)
    )
    torch.manual_seed(rank)
    rows = torch.randint(256, (count, row_bytes), dtype=torch.uint8, device="cuda")
    order = torch.randperm(count, device="cuda").repeat(ranks - 1)
    counts = [0 if other == rank else count for other in range(ranks)]
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    at = rank * count * row_bytes
    sent = count * row_bytes * (ranks - 1)
    rates = {}
    for blocks in BULK_BLOCKS:

        def push(blocks: int = blocks) -> None:
            exchange.push_rows(rows, order, ends, 1, memory.ranks, rank, at, count, blocks)

        memory.own.zero_()
        torch.cuda.synchronize()
        dist.barrier()
        push()
        torch.cuda.synchronize()
        dist.barrier()
        check(memory, rows, order, count)
        rates[f"bulk, {blocks} blocks" if blocks else "stores"] = sent / timed(push, args) / 1e6

    def copy() -> None:
        for other in range(ranks):
            if other != rank:
                memory.ranks[other][at : at + rows.numel()].copy_(rows.view(-1))

    rates["aside"] = sent / timed(copy, args) / 1e6
    return rates


def check(memory: SymmetricMemory, rows: torch.Tensor, order: torch.Tensor, count: int) -> None:
    """Compares what came with what the others sent.

    Raises:
        RuntimeError: if a byte differs.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    everybodys = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(everybodys, rows[order[:count]])
    for other in range(ranks):
        if other != rank:
            came = memory.own.view(ranks, count, -1)[other]
            if not torch.equal(came, everybodys[other]):
                raise RuntimeError(f"rank {rank}: wrong bytes from rank {other}")


def flags(args: argparse.Namespace) -> float:
    """Microseconds of an exchange without rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lines = 3 * ranks * exchange.FLAG_BYTES  # who has given up, and two that take turns
    memory = SymmetricMemory(dist.group.WORLD, lines, torch.device("cuda", rank))
    memory.own.zero_()
    torch.cuda.synchronize()
    dist.barrier()
    report = torch.zeros(4, dtype=torch.int64, pin_memory=True)
    number = 0

    def meet() -> None:
        nonlocal number
        number += 1
        at, value = (1 + number % 2) * ranks * exchange.FLAG_BYTES, number << exchange.TAG_BITS
        exchange.set_flags(memory.ranks, rank, at, value)
        exchange.wait_for_flags(memory.ranks, rank, at, value, report, 20.0, False)

    found = 1000 * timed(meet, args)
    if report.any():
        raise RuntimeError(f"rank {rank}: a wait failed: {report.tolist()}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Measures on all ranks, and prints on the first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    dist.init_process_group("nccl")
    device = torch.device("cuda", dist.get_node_local_rank())
    torch.cuda.set_device(device)
    check_reachable(dist.group.WORLD, device)  # as in training, without multicast
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "GB_per_s": {},
    }
    for row_bytes in ROW_BYTES:
        found["GB_per_s"][row_bytes] = rates = pushes(row_bytes, args)
        if dist.get_rank() == 0:
            text = "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
            print(f"rows of {row_bytes} bytes, GB/s: {text}", flush=True)
    found["flag_us"] = flags(args)
    if dist.get_rank() == 0:
        print(f"an exchange without rows: {found['flag_us']:.1f} us")
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
