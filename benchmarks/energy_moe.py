"""Measures the energy per step of an MoE layer, ours and peers', under sustained load.

    python benchmarks/energy_moe.py --configs switch-8,fastmoe-64 --peers ours,torch

Under load a GPU lowers its clock until it stays below its power limit. The time of a step that is
repeated for hours, as in training, is then its energy divided by that power, not the sum of its
kernels' times on a cool device. The estimate in the last column is the energy of a large dense GEMM
with the layer's FLOPs, plus that of a large copy (above idle) of the bytes that the kernels move if
each reads its operands once (`layer/floors.py`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from layer import floors, machine, measure, power
from layer.configs import Config, parse_configs
from layer.errors import BenchmarkError
from layer.floors import Sizes, Work
from layer.machine import Yardsticks
from layer.power import Sustained
from layer.registry import PEERS, parse_peers
from layer.report import add_options, write
from layer.routings import parse_routings
from layer.worker import Bench

SHORTEST = 0.3
"""Shortest time in seconds in which the driver gives enough power readings for a mean."""


@dataclass(frozen=True)
class Scale:
    """Energy that the device needs for a dense GEMM and for a copy, as a reference.

    Attributes:
        yardsticks: the dense GEMM and the copy to run.
        dense: measurement of the GEMM.
        copy: measurement of the copy.
        idle: power of the idle device, in watts.
    """

    yardsticks: Yardsticks
    dense: Sustained
    copy: Sustained
    idle: float

    @property
    def per_flop(self) -> float:
        """Joules per FLOP of the dense GEMM, including idle power."""
        return self.dense.joules / self.yardsticks.flops

    @property
    def per_byte(self) -> float:
        """Joules per byte read or written by the copy, above idle power."""
        beyond = (self.copy.watts - self.idle) * self.copy.ms / 1e3
        return beyond / self.yardsticks.bytes

    def of(self, work: Work) -> float:
        """Estimated energy of ``work``, in joules."""
        return work.flops * self.per_flop + work.bytes * self.per_byte


def work_of(sizes: Sizes) -> Work:
    """Work of a layer that gathers inside its GEMMs and sums each token's K rows separately."""
    kernels = [
        floors.sort,
        floors.fused_up,
        floors.down_product,
        floors.fused_down_backward,
        floors.gathered_down_gradient,
        floors.rows_gradient,
        floors.gathered_up_gradient,
    ]
    if sizes.k > 1:
        kernels += [floors.weighted_sum, floors.plain_sum]
    total = Work(0, 0)
    for kernel in kernels:
        total += kernel(sizes)
    return total


def measure_scale(device: torch.device, seconds: float) -> Scale:
    """Measures the dense GEMM, the copy and the idle device.

    Raises:
        BenchmarkError: if the driver doesn't report power.
    """
    idle = power.idle_watts(device, seconds)
    large = machine.yardsticks(device)
    return Scale(
        large,
        power.sustained(large.dense, device, seconds),
        power.sustained(large.copy, device, seconds),
        idle,
    )


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = ["| what | ms | watts | MHz | joules | against the estimate |", "|" + "---|" * 6]
    for row in report["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['name']} | {row['status']}: {row['reason']} |" + " |" * 4)
            continue
        estimate = row["estimate_j"]
        cells = [row["name"], f"{row['ms']:.3f}", f"{row['watts']:.0f}", f"{row['mhz']:.0f}"]
        cells += [f"{row['joules']:.3f}", f"{row['joules'] / estimate:.2f}x" if estimate else ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Dense product {report['per_flop'] * 1e12:.2f} pJ per FLOP; copy"
        f" {report['per_byte'] * 1e12:.0f} pJ per byte beyond the {report['idle_watts']:.0f} W of"
        f" the idle device. {report['machine']['device']}, torch {report['machine']['torch']}.",
    ]
    return "\n".join([*lines, ""])


def row_of(name: str, found: Sustained, estimate: float | None = None) -> dict[str, Any]:
    """A row of the report: the measurement and the estimated joules."""
    return {
        "name": name,
        "status": "ok",
        "ms": found.ms,
        "watts": found.watts,
        "mhz": found.mhz,
        "joules": found.joules,
        "estimate_j": estimate,
    }


def run(
    configs: list[Config], routing: str, peers: list[str], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Measures each peer at each configuration if its results are correct (`layer/worker.py`).

    Raises:
        BenchmarkError: if a peer can't run here, or the driver doesn't report power.
    """
    benches = [Bench(PEERS[name](), device.type) for name in peers]
    for bench in benches:
        if (reason := bench.start()["reason"]) is not None:
            raise BenchmarkError(f"{bench.peer.title}: {reason}")
    scale = measure_scale(device, seconds)
    rows = [row_of("dense product", scale.dense), row_of("copy", scale.copy)]
    for config, bench in itertools.product(configs, benches):
        name = f"{config.name}, {routing}, {bench.peer.title}"
        found = bench.prepare(config, routing)
        if bench.layer is None or bench.problem is None:
            rows.append({"name": name, "status": found["status"], "reason": found["reason"]})
            continue
        busy = int(bench.problem.expert_ids.unique().numel())
        estimate = scale.of(work_of(Sizes.of(config, busy)))
        step = partial(measure.step, bench.layer, bench.problem.grad)
        rows.append(row_of(name, power.sustained(step, device, seconds), estimate))
        del step
        bench.drop()
        print(f"{name}: {rows[-1]['joules']:.3f} J", file=sys.stderr, flush=True)
    return {
        "machine": machine.describe(device),
        "idle_watts": scale.idle,
        "per_flop": scale.per_flop,
        "per_byte": scale.per_byte,
        "rows": rows,
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", required=True, help="'all' or names, separated by commas")
    add("--routing", default="uniform")
    add("--peers", default="ours,torch", help=f"some of {', '.join(PEERS)}")
    add("--seconds", type=float, default=2.0, help="of measuring, for each row")
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and writes what was asked for.

    Returns:
        0; 1 if a peer was refused; 2 for options that can't be met.
    """
    arguments = make_parser().parse_args(argv)
    try:
        configs, (routing, *_) = parse_configs(arguments.configs), parse_routings(arguments.routing)
        peers = parse_peers(arguments.peers)
        if not arguments.seconds >= SHORTEST:
            raise BenchmarkError(f"--seconds {arguments.seconds:g}: take {SHORTEST} or more.")
        if not torch.cuda.is_available():
            raise BenchmarkError("There is no CUDA device, and its power is what is measured.")
        report = run(configs, routing, peers, torch.device("cuda"), arguments.seconds)
    except BenchmarkError as error:
        print(f"energy_moe.py: {error}", file=sys.stderr)
        return 2
    text = markdown(report)
    print(text)
    write(arguments, report, text)
    return int(any(row["status"] == "refused" for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
