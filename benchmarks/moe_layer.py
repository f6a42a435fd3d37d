"""Compares one MoE layer with its peers: time, memory, launches and errors, forward and backward.

    python benchmarks/moe_layer.py                               # every configuration, uniform
    python benchmarks/moe_layer.py --configs sonic-7b,mixtral-8x7b --routings uniform,zipf:1.5 \\
        --peers ours,torch,transformers --json run.json --markdown run.md --plot run.png
    python benchmarks/moe_layer.py --peers ours-module,torch-router      # with their routers
    python benchmarks/moe_layer.py --device cpu --tiny           # checks the script itself

All peers get the same tokens, weights and routing. Those that do their own routing get the router's
weights instead, which lead to the same routing, and also compute both balancing losses; their
baseline in the tables does so, too. Each peer runs in a separate process, and they take turns in
every round, so that a device that slows down affects all of them. Before anything is timed, the
output and every gradient are compared with an fp32 computation, one expert at a time; a peer whose
error is above 1e-2 is refused. A peer that isn't installed, fails or takes too long gets a row that
says so. `layer/measure.py` describes how time, memory and launches are measured, and
`layer/routings.py` defines the routings.

Peers that compile for minutes (liger, sonicmoe, sonicmoe-router, sonicmoe-topk) run only if named.
``--limit sonicmoe=300`` gives one of them more time to get ready for a row; ``--ahead 8`` lets
eight of them compile at once before anything is measured.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from layer import plot, table
from layer.configs import parse_configs
from layer.errors import BenchmarkError
from layer.registry import PEERS, parse_peers
from layer.report import add_options, write
from layer.routings import parse_routings
from layer.runner import Options, Runner
from layer.worker import TOLERANCE

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SCHEMA = 1
"""Version of the JSON file; increases when the meaning of a field changes."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", default="all", help="'all' or names, separated by commas")
    add("--routings", default="uniform", help="'all' or names, separated by commas")
    add("--peers", default="default", help=f"'default', 'all' or some of {', '.join(PEERS)}")
    add("--seconds-per-row", type=float, default=1.5, help="of timing, over all rounds")
    add("--rounds", type=int, default=5, help="how often each peer gets its turn")
    add(
        "--limit",
        action="append",
        default=[],
        metavar="[PEER=]SECONDS",
        help="a peer may take so long to get ready for a row (default 90)",
    )
    add("--ahead", type=int, default=0, help="compiling peers to run at once, before all else")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add("--tiny", action="store_true", help="miniature sizes, to check the script")
    add("--in-process", action="store_true", help="no processes, no limits: for a debugger")
    add_options(parser)
    add("--plot", type=Path, help="picture to write; needs matplotlib")
    return parser


def parse_limits(texts: list[str]) -> tuple[float, dict[str, float]]:
    """``["120", "sonicmoe=300"]`` -> the default limit and the limits per peer, in seconds."""
    everyone, single = 90.0, {}
    for text in texts:
        name, _, seconds = text.rpartition("=")
        try:
            value = float(seconds)
        except ValueError:
            raise BenchmarkError(f"--limit {text!r}: write SECONDS or PEER=SECONDS.") from None
        if name:
            single[parse_peers(name)[0]] = value
        else:
            everyone = value
    return everyone, single


def make_options(arguments: argparse.Namespace) -> Options:
    """Converts the command line to options.

    Raises:
        BenchmarkError: for options that can't be met.
    """
    limit, limits = parse_limits(arguments.limit)
    if arguments.plot:
        plot.check_available()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("There is no CUDA device; --device cpu --tiny checks the script.")
    if arguments.device == "cpu" and not arguments.tiny:
        raise BenchmarkError("The real sizes take hours on a CPU; add --tiny.")
    return Options(
        device=arguments.device,
        dtype=DTYPES[arguments.dtype],
        seconds=arguments.seconds_per_row,
        rounds=arguments.rounds,
        limit=limit,
        limits=limits,
        in_process=arguments.in_process,
        ahead=arguments.ahead,
    )


def measure(arguments: argparse.Namespace, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Runs what the command line asks for.

    Yields:
        What ``--json`` writes, anew after each configuration and routing, so that a run that is
        cut short leaves what it has.

    Raises:
        BenchmarkError: for options that can't be met.
    """
    configs, routings = parse_configs(arguments.configs), parse_routings(arguments.routings)
    peers, options = parse_peers(arguments.peers), make_options(arguments)
    if arguments.tiny:
        configs = [config.tiny() for config in configs]
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with Runner(peers, options, say) as runner:
        runner.compile_ahead(configs)
        for config, routing in itertools.product(configs, routings):
            rows += runner.run(config, routing)
            yield {
                "schema": SCHEMA,
                "command": sys.argv[1:],
                "machine": runner.about["device"],
                "peers": {peer: runner.about[peer] for peer in peers},
                "dtype": arguments.dtype,
                "tolerance": TOLERANCE,
                "seconds": time.perf_counter() - begin,
                "dense_tflops": statistics.median(row["dense_tflops"] for row in rows),
                "copy_gbs": statistics.median(row["copy_gbs"] for row in rows),
                "sizes": table.sizes_of([c.name for c in configs], arguments.tiny),
                "rows": rows,
            }


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and writes what was asked for.

    Returns:
        0; 1 if a peer was refused; 2 for options that can't be met.
    """
    arguments = make_parser().parse_args(argv)
    report: dict[str, Any] = {"rows": []}
    try:
        for report in measure(arguments, lambda line: print(line, file=sys.stderr, flush=True)):
            write(arguments, report, table.markdown(report))
    except BenchmarkError as error:
        print(f"moe_layer.py: {error}", file=sys.stderr)
        return 2
    print(table.markdown(report))
    if arguments.plot:
        plot.plot(report, arguments.plot)
    return int(any(row["status"] == "refused" for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
