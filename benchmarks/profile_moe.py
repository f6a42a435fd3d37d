"""Profiles one step of an MoE layer kernel by kernel, against each kernel's lower bound in time.

    python benchmarks/profile_moe.py --config sonic-7b
    python benchmarks/profile_moe.py --config olmoe-1b-7b --routing zipf:1.5 --module

A kernel's floor is the larger of the times that its FLOPs take at the rate of a large dense GEMM
and its bytes at the rate of a large copy, both measured in the same run (`layer/floors.py`).
`layer/phases.py` maps kernels to phases; unknown kernels are listed as "other". Times are medians
over several profiled steps. The gaps are the step's time minus the sum of its kernels' times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from typing import Any

import torch
from layer import floors, machine, measure
from layer.configs import CONFIGS, parse_configs
from layer.errors import BenchmarkError
from layer.floors import Rates, Sizes
from layer.peers import Layer
from layer.phases import Entry, assign, table_for
from layer.problem import make_problem
from layer.registry import PEERS
from layer.report import add_options, write
from layer.routings import parse_routings
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHORTEST_US = 0.5
"""Floors below this are meaningless, because launching a kernel takes longer."""

Kernel = tuple[str, float]
"""A kernel's name and its time in microseconds."""


def profiled_step(layer: Layer, grad: Tensor) -> list[Kernel]:
    """The kernels of one step in the order in which they ran, including copies and fills."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        measure.step(layer, grad)
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, float(e.time_range.elapsed_us())) for e in events]


def medians(steps: list[list[Kernel]]) -> list[Kernel]:
    """The median time of each kernel over the steps with the most common sequence of kernels."""
    sequences = Counter(tuple(name for name, _ in step) for step in steps)
    names, _ = sequences.most_common(1)[0]
    common = [step for step in steps if tuple(name for name, _ in step) == names]
    return [
        (name, statistics.median(step[i][1] for step in common)) for i, name in enumerate(names)
    ]


def make_report(
    kernels: list[Kernel],
    step_ms: float,
    entries: tuple[Entry, ...],
    sizes: Sizes,
    rates: Rates,
) -> dict[str, Any]:
    """Builds the report that is printed and saved.

    Args:
        kernels: kernels of one step.
        step_ms: time of a step without the profiler, in milliseconds.
        entries: phase of each kernel.
        sizes: sizes of the problem.
        rates: measured rates of the device.
    """
    places = assign([name for name, _ in kernels], entries)
    phases = []
    for index, entry in enumerate(entries):
        mine = [kernel for kernel, place in zip(kernels, places, strict=True) if place == index]
        work = entry.floor(sizes) if entry.floor is not None else None
        phases.append(
            {
                "group": entry.group,
                "phase": entry.phase,
                "us": sum(us for _, us in mine),
                "floor_us": work.floor_us(rates) if work else None,
                "bound": work.bound(rates) if work else None,
                "kernels": [{"name": name, "us": us} for name, us in mine],
            }
        )
    unknown = [k for k, place in zip(kernels, places, strict=True) if place is None]
    others = [{"name": name, "us": us} for name, us in unknown]
    total = sum(us for _, us in kernels)
    whole = floors.whole_layer(sizes)
    return {
        "step_us": step_ms * 1e3,
        "kernels_us": total,
        "gaps_us": step_ms * 1e3 - total,
        "phases": phases,
        "other": others,
        "other_us": sum(us for _, us in unknown),
        "layer_floor_us": whole.floor_us(rates),
        "layer_bound": whole.bound(rates),
        "dense_tflops": rates.dense_tflops,
        "copy_gbs": rates.copy_gbs,
    }


def markdown(report: dict[str, Any], title: str) -> str:
    """The report as a table."""
    lines = [f"### {title}", "", "| group | phase | us | floor us | ratio | bound | kernel |"]
    lines.append("|" + "---|" * 7)
    for phase in report["phases"]:
        cells = [phase["group"], phase["phase"]]
        if not phase["kernels"]:
            lines.append("| " + " | ".join([*cells, "not seen", "", "", "", ""]) + " |")
            continue
        cells += [*_times(phase["us"], phase["floor_us"]), phase["bound"] or ""]
        names = Counter(_short(kernel["name"]) for kernel in phase["kernels"])
        cells.append(", ".join(n if c == 1 else f"{c} x {n}" for n, c in names.items()))
        lines.append("| " + " | ".join(cells) + " |")
    for kernel in report["other"]:
        name = _short(kernel["name"])
        lines.append(f"| other | | {kernel['us']:.1f} | | | | {name} |")
    lines += ["", "| group | us | floor us | ratio |", "|---|---|---|---|"]
    groups = dict.fromkeys(phase["group"] for phase in report["phases"])
    for group in groups:
        mine = [p for p in report["phases"] if p["group"] == group and p["kernels"]]
        spent = sum(p["us"] for p in mine)
        lines.append(f"| {group} | {' | '.join(_times(spent, _floor(mine)))} |")
    products = [p for p in report["phases"] if p["kernels"] and "product" in p["group"]]
    rest = [p for p in report["phases"] if p["kernels"] and "product" not in p["group"]]
    for name, mine in (("all products", products), ("everything else", rest)):
        spent = sum(p["us"] for p in mine)
        lines.append(f"| {name} | {' | '.join(_times(spent, _floor(mine)))} |")
    seen = [p for p in report["phases"] if p["kernels"]]
    lines += [
        f"| other | {report['other_us']:.1f} | | |",
        f"| all kernels | {' | '.join(_times(report['kernels_us'], _floor(seen)))} |",
        f"| gaps between kernels | {report['gaps_us']:.1f} | | |",
        f"| the step, against the whole layer's floor ({report['layer_bound']}) |"
        f" {' | '.join(_times(report['step_us'], report['layer_floor_us']))} |",
        "",
        f"Dense product {report['dense_tflops']:.0f} TFLOP/s, copy {report['copy_gbs']:.0f} GB/s.",
    ]
    return "\n".join([*lines, ""])


def _floor(phases: list[dict[str, Any]]) -> float:
    return sum(phase["floor_us"] or 0.0 for phase in phases)


def _times(us: float, floor: float | None) -> tuple[str, str, str]:
    if not floor or floor < SHORTEST_US:
        return f"{us:.1f}", "", ""
    return f"{us:.1f}", f"{floor:.1f}", f"{us / floor:.2f}"


def _short(name: str) -> str:
    """A kernel's name without its template arguments, which can fill a page."""
    plain = name.replace("void ", "").replace("(anonymous namespace)::", "").split("(")[0]
    return plain.split("<")[0][-60:] + ("<...>" if "<" in plain else "")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help=f"one of {', '.join(CONFIGS)}; several with commas")
    add("--routing", default="uniform")
    add("--module", action="store_true", help="the whole module, with router and losses")
    add("--steps", type=int, default=7, help="profiled steps")
    add_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Profiles what the command line asks for; returns the reports and their tables.

    Raises:
        BenchmarkError: for options that can't be met.
    """
    if not torch.cuda.is_available():
        raise BenchmarkError("There is no CUDA device, and kernels are what is profiled.")
    device = torch.device("cuda")
    configs, (routing, *_) = parse_configs(arguments.config), parse_routings(arguments.routing)
    peer = PEERS["ours-module" if arguments.module else "ours"]()
    if (reason := peer.unavailable(None, device)) is not None:
        raise BenchmarkError(f"{peer.title}: {reason}")
    peer.start(device)
    report: dict[str, Any] = {"machine": machine.describe(device), "version": peer.version()}
    report["profiles"], tables = {}, []
    for config in configs:
        found = {k: statistics.median(v) for k, v in machine.rates(device, 0.3).items()}
        problem = make_problem(config, routing, device)
        layer = peer.build(problem)
        measure.first_step(layer, problem.grad)
        times = measure.time_layer(layer, problem.grad, 1.0)
        steps = [profiled_step(layer, problem.grad) for _ in range(arguments.steps + 1)]
        busy = int(problem.expert_ids.unique().numel())
        kernels = medians(steps[1:])  # the profiler's first use disturbs
        profiled = make_report(
            kernels,
            statistics.median(times["step"]),
            table_for([kernel for kernel, _ in kernels], arguments.module),
            Sizes.of(config, busy),
            Rates(found["dense_tflops"], found["copy_gbs"]),
        )
        name = f"{config.name}, {routing}, {peer.title}"
        report["profiles"][name] = profiled
        tables.append(markdown(profiled, name))
        del layer, problem
        torch.cuda.empty_cache()
    return report, "\n".join(tables)


def main(argv: list[str] | None = None) -> int:
    """Profiles, prints, and writes what was asked for; 2 for options that can't be met."""
    arguments = make_parser().parse_args(argv)
    try:
        report, text = run(arguments)
    except BenchmarkError as error:
        print(f"profile_moe.py: {error}", file=sys.stderr)
        return 2
    print(text)
    write(arguments, report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
