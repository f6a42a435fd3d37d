"""The energy of one step of the layer, ours and peers', while the device is kept busy.

    python benchmarks/energy_moe.py --configs switch-8,fastmoe-64 --peers ours,torch

Under load a GPU lowers its clock until it stays below its power limit. A step that is repeated for
hours, as in training, then takes the energy that it needs over that power, and not the time that
its kernels take one by one on a cool device. The estimate beside it is what a large dense product
needs for the layer's FLOPs, and a large copy, beyond an idle device, for the bytes that its kernels
move if each reads its operands once (`layer/floors.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layer import floors, machine, measure, power
from layer.configs import parse_configs
from layer.errors import BenchmarkError
from layer.floors import Sizes, Work
from layer.power import Sustained
from layer.problem import make_problem
from layer.registry import PEERS, parse_peers
from layer.routings import parse_routings

SHORTEST = 0.3
"""Seconds in which the driver answers often enough to make a mean."""


@dataclass(frozen=True)
class Scale:
    """What the device needs for simple things.

    Attributes:
        dense: a dense bf16 product of :data:`layer.machine.DENSE` rows.
        copy: copying :data:`layer.machine.COPY_BYTES`.
        idle: watts without work.
    """

    dense: Sustained
    copy: Sustained
    idle: float

    @property
    def per_flop(self) -> float:
        """Joules, of the dense product, all that the device draws included."""
        return self.dense.joules / (2 * machine.DENSE**3)

    @property
    def per_byte(self) -> float:
        """Joules, of the copy, read and written counted, beyond what an idle device draws."""
        beyond = (self.copy.watts - self.idle) * self.copy.ms / 1e3
        return beyond / (2 * machine.COPY_BYTES)

    def of(self, work: Work) -> float:
        """Joules that ``work`` would take."""
        return work.flops * self.per_flop + work.bytes * self.per_byte


def work_of(sizes: Sizes) -> Work:
    """All of a layer that gathers inside its products, with K rows of a token added apart."""
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
    """Runs the simple things.

    Raises:
        BenchmarkError: if the driver tells no power.
    """
    idle = power.idle_watts(device, seconds)
    a, b = (torch.randn(machine.DENSE, machine.DENSE, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    dense = power.sustained(partial(torch.mm, a, b, out=out), device, seconds)
    source = torch.randn(machine.COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = power.sustained(partial(target.copy_, source), device, seconds)
    return Scale(dense, copy, idle)


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = ["| what | ms | watts | MHz | joules | against the estimate |", "|" + "---|" * 6]
    for row in report["rows"]:
        least = row["joules"] / row["estimate_j"] if row["estimate_j"] else None
        lines.append(
            f"| {row['name']} | {row['ms']:.3f} | {row['watts']:.0f} | {row['mhz']:.0f} |"
            f" {row['joules']:.3f} | {'' if least is None else f'{least:.2f}x'} |"
        )
    lines += [
        "",
        f"Dense product {report['per_flop'] * 1e12:.2f} pJ per FLOP; copy"
        f" {report['per_byte'] * 1e12:.0f} pJ per byte beyond the {report['idle_watts']:.0f} W of"
        f" the idle device. {report['machine']['device']}, torch {report['machine']['torch']}.",
    ]
    return "\n".join([*lines, ""])


def _row(name: str, found: Sustained, estimate: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "ms": found.ms,
        "watts": found.watts,
        "mhz": found.mhz,
        "joules": found.joules,
        "estimate_j": estimate,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for.

    Raises:
        BenchmarkError: for options that can't be met.
    """
    configs, (routing, *_) = parse_configs(arguments.configs), parse_routings(arguments.routing)
    peers = [PEERS[name]() for name in parse_peers(arguments.peers)]
    if not arguments.seconds >= SHORTEST:
        raise BenchmarkError(f"--seconds {arguments.seconds:g}: take {SHORTEST} or more.")
    if not torch.cuda.is_available():
        raise BenchmarkError("There is no CUDA device, and its power is what is measured.")
    device = torch.device("cuda")
    for peer in peers:
        if (reason := peer.unavailable(None, device)) is not None:
            raise BenchmarkError(f"{peer.title}: {reason}")
        peer.start(device)
    scale = measure_scale(device, arguments.seconds)
    rows = [
        _row(f"dense product of {machine.DENSE} rows", scale.dense, None),
        _row("copy of 1 GiB", scale.copy, None),
    ]
    for config in configs:
        problem = make_problem(config, routing, device)
        busy = int(problem.expert_ids.unique().numel())
        estimate = scale.of(work_of(Sizes.of(config, busy)))
        for peer in peers:
            if (reason := peer.unavailable(config, device)) is not None:
                raise BenchmarkError(f"{peer.title}, {config.name}: {reason}")
            layer = peer.build(problem)
            step = partial(measure.step, layer, problem.grad)
            found = power.sustained(step, device, arguments.seconds)
            name = f"{config.name}, {routing}, {peer.title}"
            rows.append(_row(name, found, estimate))
            print(f"{name}: {found.ms:.3f} ms, {found.joules:.3f} J", file=sys.stderr, flush=True)
            layer.forget_gradients()
            del layer, step
            torch.cuda.empty_cache()
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
    add("--json", type=Path, help="file to write")
    add("--markdown", type=Path, help="file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and writes what was asked for; 2 for options that can't be met."""
    arguments = make_parser().parse_args(argv)
    try:
        report = run(arguments)
    except BenchmarkError as error:
        print(f"energy_moe.py: {error}", file=sys.stderr)
        return 2
    text = markdown(report)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
