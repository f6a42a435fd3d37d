"""Show a checkpoint's contents: layers, experts, sizes, step and topology.

Reads only the manifest, so it is fast for checkpoints of any size; hashes are not checked.
"""

from __future__ import annotations

import argparse
from typing import Any

from lightning_fastmoe.cli.checkpoint.console import plural, print_json, print_text, readable, table
from lightning_fastmoe.cli.checkpoint.opening import add_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_source(parser)
    parser.add_argument("--tensors", action="store_true", help="also list every tensor")


def run(arguments: argparse.Namespace) -> int:
    """Print the summary."""
    from lightning_fastmoe.checkpoint import CheckpointReader
    from lightning_fastmoe.checkpoint.tools.inspect import summarize

    with CheckpointReader(arguments.checkpoint) as reader:
        summary = summarize(reader, tensors=arguments.tensors)
    if arguments.json:
        print_json(summary)
    else:
        print_text(*_lines(summary))
    return 0


def _lines(s: dict[str, Any]) -> list[str]:
    topology, weights = s["topology"], s["weights"]
    lines = [
        f"{s['path']}",
        f"  written by    {s['written_by']}, format version {s['format_version']}",
        f"  contents      {', '.join(s['contents'])}; {readable(s['bytes'])} in"
        f" {len(s['files'])} files",
        f"  progress      epoch {s['epoch']}, step {s['global_step']}",
        f"  saved on      {plural(topology['world_size'], 'rank')}, expert parallel size"
        f" {topology['expert_parallel_size']}, ZeRO stage {topology['zero_stage']}, precision"
        f" {topology['precision']}",
        f"  weights       {weights['elements']:,} in {plural(weights['tensors'], 'tensor')}"
        f" ({', '.join(weights['dtypes'])}), {readable(weights['bytes'])}",
    ]
    for state, about in s["optimizer"].items():
        lines.append(
            f"  optimizer     {state}: {about['elements']:,} in"
            f" {plural(about['tensors'], 'tensor')}, {readable(about['bytes'])}"
        )
    for name, first in s["tied"].items():
        lines.append(f"  tied          {name} is {first}")
    if s["excluded"]:
        lines.append(f"  left out      {plural(len(s['excluded']), 'frozen parameter')}")
    if s["moe_layers"]:
        rows = [["MoE layer", "experts", "tensors", "with optimizer"]]
        for layer in s["moe_layers"]:
            size = readable(layer["bytes_with_optimizer"])
            first, *others = layer["modules"] or [{"tensors": layer["experts"]}]
            experts = str(layer["num_experts"])
            rows.append([layer["name"], experts, _kind(first), size])
            rows += [["", "", _kind(other), ""] for other in others]
        lines += ["", *table(rows)]
    if "tensors" in s:
        rows = [["tensor", "dtype", "shape", "size", "fragments"]]
        for name, about in s["tensors"].items():
            size = readable(about["bytes"])
            shape = _shape(about["shape"])
            rows.append([name, about["dtype"], shape, size, str(about["pieces"])])
        lines += ["", *table(rows)]
    return lines


def _kind(kind: dict[str, Any]) -> str:
    """One line for experts with equal tensors, with their global ids unless they are stacked."""
    tensors = [f"{n} {a['dtype']} {_shape(a['shape'])}" for n, a in kind["tensors"].items()]
    ids = f"{ranges(kind['ids'])}: " if "ids" in kind else ""
    return ids + ("; ".join(tensors) or "nothing")


def ranges(ids: list[int]) -> str:
    """``0-2,5`` for 0, 1, 2 and 5."""
    parts: list[list[int]] = []
    for i in ids:
        if parts and i == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], i]
        else:
            parts.append([i, i])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
