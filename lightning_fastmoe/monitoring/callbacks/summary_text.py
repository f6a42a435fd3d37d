"""MoESummary's output as plain text, and the helpers that its tables share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_fastmoe.planning.memory import MemoryPlan
from lightning_fastmoe.planning.sizes import LayerSize, ModelSize
from lightning_fastmoe.planning.units import count_text

HELD = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer and fp32 weights",
    "buffers": "communication buffers",
}
"""Fields of :class:`~lightning_fastmoe.planning.memory.Bytes` -> their labels."""
HEADER = ("per rank", "dense", "experts", "together")


@dataclass(frozen=True)
class Summary:
    """The contents of a summary.

    Attributes:
        size: the size of the model.
        memory: the memory plan; None if unknown.
        ranks: the run's groups and settings; empty if they are unknown.
    """

    size: ModelSize
    memory: MemoryPlan | None = None
    ranks: str = ""


def plain_text(summary: Summary) -> str:
    """The summary as text, with an empty line before and after."""
    lines = parameters_text(summary.size)
    if summary.ranks:
        lines.append(f"Ranks: {summary.ranks}")
    if summary.memory is not None:
        lines += memory_text(summary.memory)
    return "\n".join(["", *lines, "", ""])


def kinds_of_layers(size: ModelSize) -> dict[LayerSize, list[str]]:
    """Layers with the same numbers, in the model's order."""
    kinds: dict[LayerSize, list[str]] = {}
    for name, layer in size.layers.items():
        kinds.setdefault(layer, []).append(name)
    return kinds


def parameters_text(size: ModelSize) -> list[str]:
    """Lines about parameters; layers with the same numbers share one."""
    share = size.active / max(size.total, 1)
    lines = [
        f"Parameters: {count_text(size.total)}, of which a token uses {count_text(size.active)}"
        f" ({share:.0%}); {count_text(size.dense)} outside of experts."
    ]
    for layer, names in kinds_of_layers(size).items():
        where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        lines.append(
            f"{len(names)} MoE layer{'s' * (len(names) > 1)} ({where}):"
            f" {layer.num_experts} experts of {count_text(round(layer.parameters_per_expert))},"
            f" {layer.num_local_experts} on this rank, {layer.experts_per_token:g} per token."
        )
    return lines


def memory_rows(memory: MemoryPlan) -> list[tuple[str, str, str, str]]:
    """A row for each kind of bytes, and the sum on the device as the last one."""
    rows = []
    for name, label in HELD.items():
        parts = [getattr(x, name) for x in (memory.dense, memory.experts, memory.total)]
        where = " (host)" if name in memory.total.on_host else ""
        dense, experts = ("", "") if name == "buffers" else map(size_text, parts[:2])
        rows.append((label + where, dense, experts, size_text(parts[2])))
    dense, experts, total = (
        size_text(x.device) for x in (memory.dense, memory.experts, memory.total)
    )
    return [*rows, ("on the device", dense, experts, total)]


def memory_text(memory: MemoryPlan) -> list[str]:
    """A table of bytes per rank, and what it leaves out."""
    table: list[Sequence[str]] = [HEADER, *memory_rows(memory)]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return [*lines, *memory_notes(memory)]


def memory_notes(memory: MemoryPlan) -> list[str]:
    """What the table leaves out."""
    notes = [
        "Not included: activations, and ZeRO's temporary copies of gradients and, in stage 3,"
        " gathered weights."
    ]
    if memory.state_bytes is None:
        notes.append("The optimizer's own states are unknown and not included.")
    return notes


def size_text(number: int) -> str:
    """A number of bytes."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"
