"""Whole training steps: this package's strategy beside plain loops and transformers.

    python benchmarks/train_step.py --shape gpu_lm --steps 40
    python benchmarks/train_step.py --shape olmoe --rows strategy-compiled transformers
    python benchmarks/train_step.py --shape gpu_lm --rows strategy --profile
    python benchmarks/train_step.py --shape gpu_lm --gpus 2 --rows strategy experts-compiled

Every row trains a decoder of the same sizes (a config of Qwen3-MoE) on the same batches with AdamW
and clipping, in a process of its own, one after the other, for --rounds rounds. A step is timed
from the end of the step before, by the device, without waiting for it; the median excludes
--warm-up steps. Model FLOPs are printed with their formula in training/shapes.py. --profile adds
steps after those that are timed, the last of them under torch.profiler, splits it by the kernels'
names, and lists on stderr the longest kernels and the longest gaps between them. The first losses
of all rows must agree within 4 %, and the medians of their last eight within 5 %, or the script
ends with status 1: what doesn't train the same is not compared. With --gpus, each GPU trains
batches of its own of the same size; times, rates and losses are those of the first. With --lr 0
routing stays as it is in the first step, in all rows, so that it isn't what makes them differ. Rows
of other packages (PEFT, Liger, SonicMoE) run only if named; without its package, a row says so, and
the others are compared. Liger and SonicMoE compile for minutes in the first step: give them --limit
900.

Prints a line of JSON for each run, then a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from training.shapes import SHAPES, Shape

H100_DENSE_BF16 = 989.4e12
"""FLOPs per second (NVIDIA's data sheet); an H200 has the same."""
FIRST, LAST = 0.04, 0.05


def measure(name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one row in this process."""
    import torch
    from training import kernels, rows
    from training.clock import PROFILED, Clock, Profiling

    row = dataclasses.replace(rows.ROWS[name], gpus=args.gpus)
    if args.lr is not None:
        row = dataclasses.replace(row, lr=args.lr)
    cuda = torch.cuda.is_available()
    profiled = args.profile and cuda
    clock = Profiling(args.steps) if profiled else Clock()
    row.trains(row, shape, args.steps + PROFILED * profiled, clock)
    found = clock.report(args.warm_up, args.steps)
    if cuda:
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["device"] = torch.cuda.get_device_name()
    if isinstance(clock, Profiling):
        ran = clock.kernels()
        found["split_ms"] = kernels.split(ran)
        print(name, *kernels.longest(ran), *kernels.gaps(ran), sep="\n", file=sys.stderr)
    return found


def work(
    pipe: Connection, name: str, shape: Shape, args: argparse.Namespace, rank: int, port: int
) -> None:
    """Sends what :func:`measure` finds, or the error."""
    os.dup2(2, 1)  # what is trained prints; the results are for stdout
    if args.gpus > 1:  # tells Lightning that the other ranks' processes exist
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0"
        )
    try:
        pipe.send(measure(name, shape, args))
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def run(context: Any, name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One run of a row, in a process for each GPU."""
    from lightning_fastmoe.testing import free_port

    port = free_port()
    ranks = []
    for rank in range(args.gpus):
        mine, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, name, shape, args, rank, port))
        process.start()
        theirs.close()
        ranks.append((process, mine))
    until = time.monotonic() + args.limit
    found = [_result(process, pipe, until, args.limit) for process, pipe in ranks]
    for process, _ in ranks:
        process.join(10)
        process.kill()
        process.join()
    return {"row": name, **next((one for one in found if "error" in one), found[0])}


def _result(process: Any, pipe: Connection, until: float, limit: float) -> dict[str, Any]:
    try:
        if pipe.poll(max(0.0, until - time.monotonic())):
            found: dict[str, Any] = pipe.recv()
            return found
    except EOFError:
        process.join(5)
        return {"error": f"its process ended with status {process.exitcode}"}
    return {"error": f"no end in {limit} s"}


def table(runs: list[dict[str, Any]], shape: Shape) -> tuple[list[str], bool]:
    """Lines of Markdown, and whether all rows trained the same."""
    names = list(dict.fromkeys(one["row"] for one in runs))
    good = {name: [r for r in runs if r["row"] == name and "ms" in r] for name in names}
    base = next((found[0] for found in good.values() if found), None)
    lines = [
        "| | ms per step | tokens/s | model TFLOP/s | of 989 | peak GiB | first, last losses |",
        "|---|---|---|---|---|---|---|",
    ]
    same = base is not None
    for name, found in good.items():
        if missing := next((r["missing"] for r in runs if r["row"] == name and "missing" in r), ""):
            lines.append(f"| {name} | {missing} | | | | | |")
            continue
        if base is None or not found:
            lines.append(f"| {name} | failed | | | | | |")
            same = False
            continue
        ms = statistics.median(r["ms"] for r in found)
        rate = 1000 * shape.tokens / ms
        flops = rate * shape.flops_per_token()
        one = found[-1]
        lines.append(
            f"| {name} | {ms:.1f} | {rate:,.0f} | {flops / 1e12:.0f} |"
            f" {100 * flops / H100_DENSE_BF16:.0f} % | {one.get('peak_GiB', '')} |"
            f" {one['first_loss']:.3f}, {one['last_loss']:.3f} |"
        )
        same &= abs(one["first_loss"] / base["first_loss"] - 1) <= FIRST
        same &= abs(one["last_loss"] / base["last_loss"] - 1) <= LAST
    return lines, same


def main() -> None:
    """Runs all rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpu_lm")
    parser.add_argument(
        "--rows", nargs="+", default=None, help="default: all that need no other package"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a row may take")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--lr", type=float, default=None, help="learning rate of all rows")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    # Check by NVML: a library that looks for GPUs on import would break CUDA in all forks.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from training.rows import ROWS

    able = [name for name, row in ROWS.items() if row.takes(args.gpus)]
    names = args.rows or [name for name in able if ROWS[name].needs is None]
    if unknown := sorted(set(names) - set(ROWS)):
        parser.error(f"unknown rows: {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    if one_gpu := sorted(set(names) - set(able)):
        parser.error(f"rows that don't train on {args.gpus} GPUs: {', '.join(one_gpu)}")
    if args.warm_up + 2 > args.steps:
        parser.error(f"--steps {args.steps} leaves nothing to time after --warm-up {args.warm_up}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "lightning_fastmoe.demos.byte_lm.cli",
            "lightning_fastmoe.huggingface.decoder",
            "transformers",
        ]
    )
    shape = SHAPES[args.shape]
    print(f"{shape}; model FLOPs per token {shape.flops_per_token():,.0f}", file=sys.stderr)
    runs = []
    for _ in range(args.rounds):
        for name in names:
            if missing := ROWS[name].missing():
                found = {"row": name, "missing": missing}
            else:
                found = run(context, name, shape, args)
            if "error" in found:
                print(f"{name}: {found['error']}", file=sys.stderr)
                found["error"] = found["error"].splitlines()[-1]
            print(json.dumps(found), flush=True)
            runs.append(found)
    lines, same = table(runs, shape)
    print(*lines, sep="\n")
    if not same:
        print("These rows don't train the same, or failed: no comparison.", file=sys.stderr)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
