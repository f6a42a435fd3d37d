"""MoESummary's output as tables; needs ``rich``."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_fastmoe.monitoring.callbacks.summary_text import (
    HEADER,
    Summary,
    kinds_of_layers,
    memory_notes,
    memory_rows,
    plain_text,
)
from lightning_fastmoe.planning.memory import MemoryPlan
from lightning_fastmoe.planning.sizes import LayerSize, ModelSize
from lightning_fastmoe.planning.units import count_text


def print_tables(summary: Summary, console: Console | None = None) -> None:
    """Prints a table of parameters, and one of bytes per rank if they are known.

    Args:
        summary: the summary; printed as plain text if the console is too narrow for tables.
        console: None is standard output, in colour on terminals that support it.
    """
    console = console or Console()
    parameters = _parameters(summary.size)
    memory = None if summary.memory is None else _memory(summary.memory)
    wide = console.options.update(max_width=1000)  # otherwise clipped to the console
    tables = [parameters] if memory is None else [parameters, memory]
    if max(console.measure(x, options=wide).maximum for x in tables) > console.width:
        console.out(plain_text(summary), highlight=False, end="")
        return
    console.print()
    console.print(parameters)
    for names in kinds_of_layers(summary.size).values():
        where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        console.print(Text(f"{_layers(names)}: {where}", style="dim"))
    if summary.ranks:
        console.print(Text("Ranks: " + summary.ranks))
    if summary.memory is not None:
        console.print()
        console.print(memory)
        for note in memory_notes(summary.memory):
            console.print(Text(note, style="dim"))
    console.print()


def _table(*columns: str) -> Table:
    """A table with the first column left-aligned and the numbers right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _parameters(size: ModelSize) -> Table:
    table = _table("parameters", "experts", "here", "per token", "of each", "total", "active")
    dense = count_text(size.dense)
    table.add_row("dense", "", "", "", "", dense, dense)
    for layer, names in kinds_of_layers(size).items():
        table.add_row(_layers(names), *_cells(layer, len(names)))
    share = size.active / max(size.total, 1)
    table.add_section()
    table.add_row(
        "whole model",
        *[""] * 4,
        count_text(size.total),
        f"{count_text(size.active)} ({share:.0%})",
        style="bold",
    )
    return table


def _layers(names: list[str]) -> str:
    return f"{len(names)} MoE layer{'s' * (len(names) > 1)}"


def _cells(layer: LayerSize, layers: int) -> list[str]:
    each = layer.parameters_per_expert
    return [
        str(layer.num_experts),
        str(layer.num_local_experts),
        f"{layer.experts_per_token:g}",
        count_text(round(each)),
        count_text(round(layers * layer.num_experts * each)),
        count_text(round(layers * layer.experts_per_token * each)),
    ]


def _memory(memory: MemoryPlan) -> Table:
    table = _table("bytes " + HEADER[0], *HEADER[1:])
    *rows, last = memory_rows(memory)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*last, style="bold")
    return table
