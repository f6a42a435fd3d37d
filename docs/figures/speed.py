"""Bars of TFLOP/s, one group for each configuration, from the tables of docs/benchmarks.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from figures.canvas import Canvas
from figures.tables import DOCS, last_number, table

PAGE = DOCS / "benchmarks.md"
LEFT, RIGHT, TOP, BOTTOM = 52.0, 16.0, 66.0, 30.0
STEP = 200
"""Step of the scale, in TFLOP/s."""


@dataclass(frozen=True)
class Series:
    """A column of a table and how it is drawn."""

    column: str
    name: str
    style: str


def bars(title: str, rows: list[dict[str, str]], label: str, series: list[Series]) -> Canvas:
    """One group of bars, from zero, for each row.

    Args:
        title: text above the bars.
        rows: rows of a table; the last number of a cell counts, and a cell without one has no bar.
        label: the column that names a group.
        series: the bars of a group, from left to right.
    """
    narrow = len(rows) * len(series) > 30
    bar, gap = (11.0, 24.0) if narrow else (38.0, 44.4)
    pitch = len(series) * bar + gap
    width, height = LEFT + RIGHT + len(rows) * pitch, 330.0
    canvas = Canvas(width, height, title)
    canvas.text(16, 26, title, "title")
    x = LEFT
    for one in series:
        canvas.rect(x, 39, 11, 11, one.style, 2)
        canvas.text(x + 16, 49, one.name, "small")
        x += 6.2 * len(one.name) + 40
    values = [[last_number(row[one.column]) for one in series] for row in rows]
    top = STEP * math.ceil(max(v for group in values for v in group if v is not None) / STEP)

    def up(value: float) -> float:
        return height - BOTTOM - value / top * (height - TOP - BOTTOM)

    for value in range(0, top + 1, STEP):
        canvas.line([(LEFT, up(value)), (width - RIGHT, up(value))], "grid")
        canvas.text(LEFT - 8, up(value) + 4, str(value), "end small quiet")
    for i, (row, group) in enumerate(zip(rows, values, strict=True)):
        start = LEFT + i * pitch + gap / 2
        name = row[label].split(":")[0]
        canvas.text(start + len(series) * bar / 2, height - 11, name, "mid small")
        for j, (one, value) in enumerate(zip(series, group, strict=True)):
            if value is None:
                continue
            at = start + j * bar
            canvas.rect(at + 1, up(value), bar - 2, height - BOTTOM - up(value), one.style, 2)
            if not narrow:
                canvas.text(at + bar / 2, up(value) - 5, f"{value:.0f}", "mid small")
    return canvas


def draw() -> Canvas:
    """Beside SonicMoE and plain torch, in one run."""
    return bars(
        "One MoE layer, forward + backward, TFLOP/s on one H100 in bf16: higher is better",
        table(PAGE, "ours", "SonicMoE", "plain torch", "ours to SonicMoE"),
        "",
        [
            Series("ours", "lightning-fastmoe", "a"),
            Series("SonicMoE", "SonicMoE 0.1.2.post1, default tiles", "b"),
            Series("plain torch", "plain torch, F.grouped_mm", "c"),
        ],
    )


def draw_peers() -> Canvas:
    """Beside all peers that need no compiling, in another run."""
    return bars(
        "One MoE layer, forward + backward, TFLOP/s on one H100 in bf16, beside peers that compile"
        " nothing",
        table(PAGE, "step TFLOP/s", "ours", "with `bmm`", "DeepSpeed"),
        "step TFLOP/s",
        [
            Series("ours", "lightning-fastmoe", "a"),
            Series("ours, `F.grouped_mm`", "without its own GEMMs", "d"),
            Series("plain torch", "plain torch", "c"),
            Series("with `bmm`", "plain torch, bmm", "b"),
            Series("transformers", "transformers 5.17", "e"),
            Series("loop", "loop over experts", "f"),
            Series("DeepSpeed", "DeepSpeed 0.19.8", "g"),
        ],
    )
