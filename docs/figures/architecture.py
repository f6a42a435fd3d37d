"""The package's components in levels, with an arrow for each direct import.

A component is a folder or a file right below the package. Its level is one above the highest of
those it imports, so every arrow points down, or the package has a cycle and nothing is drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

from figures.canvas import Canvas

PACKAGE = "lightning_fastmoe"
SOURCE = Path(__file__).resolve().parents[2] / PACKAGE
LEFT_OUT = {"__init__", "__version__"}
"""The package's own file imports what users import, and is imported by nothing."""

BOX, TALL, GAP, PITCH = 130.0, 34.0, 18.0, 84.0


def imported(file: Path) -> Iterator[str]:
    """Absolute dotted names of the modules that ``file`` imports, wherever it does so."""
    parents = [PACKAGE, *file.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = parents[: len(parents) - level + 1] if level else []
                base = [*base, *([module] if module else [])]
                yield from (".".join([*base, alias.name]) for alias in names)


def component(file: Path) -> str:
    """``ops`` for ``ops/routing.py``, ``cli`` for ``cli.py``."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def imports() -> dict[str, set[str]]:
    """component -> the components that it imports."""
    files = sorted(SOURCE.rglob("*.py"))
    known = {component(file) for file in files} - LEFT_OUT
    found: dict[str, set[str]] = {name: set() for name in sorted(known)}
    for file in files:
        if (own := component(file)) in known:
            names = {
                name.split(".")[1] for name in imported(file) if name.startswith(PACKAGE + ".")
            }
            found[own] |= (names & known) - {own}
    return found


def levels(graph: dict[str, set[str]]) -> list[list[str]]:
    """Components by level, the lowest first.

    Raises:
        graphlib.CycleError: if components import each other.
    """
    level: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        level[name] = 1 + max((level[other] for other in graph[name]), default=-1)
    return [
        sorted(name for name in graph if level[name] == i) for i in range(max(level.values()) + 1)
    ]


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """``graph`` without the imports that follow from others: a to c beside a to b to c."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(other) for other in graph[name]))

    return {
        name: others - set().union(*(reach(other) for other in others))
        for name, others in graph.items()
    }


def routed(
    rows: list[list[str]], graph: dict[str, set[str]]
) -> tuple[list[list[str]], list[tuple[str, ...]]]:
    """Rows with a waypoint in each level that an arrow passes, and each arrow as its waypoints."""
    level = {name: i for i, row in enumerate(rows) for name in row}
    rows = [list(row) for row in rows]
    arrows = []
    for name in sorted(graph):
        for other in sorted(graph[name]):
            between = range(level[name] - 1, level[other], -1)
            points = [f"{name}>{other}@{i}" for i in between]
            for i, point in zip(between, points, strict=True):
                rows[i].append(point)
            arrows.append((name, *points, other))
    return rows, arrows


def ordered(rows: list[list[str]], arrows: list[tuple[str, ...]]) -> dict[str, float]:
    """Where each box and waypoint of a row lies: by turns below and above its neighbours' mean."""
    near: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for arrow in arrows:
        for upper, lower in pairwise(arrow):
            near[upper].append(lower)
            near[lower].append(upper)
    x: dict[str, float] = {}
    for sweep in range(24):
        for row in rows if sweep % 2 else reversed(rows):
            at = {n: [x[o] for o in near[n] if o in x] for n in row}
            wanted = {n: sum(v) / len(v) if v else x.get(n, 0.0) for n, v in at.items()}
            row.sort(key=lambda n: (wanted[n], n))
            spread(row, wanted, x)
    return x


def spread(row: list[str], wanted: dict[str, float], x: dict[str, float]) -> None:
    """Puts a row's parts as near to where they are wanted as their widths allow, in their order."""
    blocks: list[list[str]] = []
    starts: list[float] = []

    def ideal(block: list[str]) -> float:
        offset, total = 0.0, 0.0
        for name in block:
            total += wanted[name] - offset - width_of(name) / 2
            offset += width_of(name)
        return total / len(block)

    for name in row:
        blocks.append([name])
        starts.append(ideal(blocks[-1]))
        while len(blocks) > 1 and starts[-2] + sum(map(width_of, blocks[-2])) > starts[-1]:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
            starts[-2:] = [ideal(blocks[-1])]
    for block, start in zip(blocks, starts, strict=True):
        for name in block:
            x[name] = start + width_of(name) / 2
            start += width_of(name)


def width_of(name: str) -> float:
    """The room of a box or of a waypoint in its row."""
    return 22.0 if "@" in name else BOX + GAP


def draw() -> Canvas:
    """The highest level above."""
    graph = direct(imports())
    rows, arrows = routed(levels(graph), graph)
    x = ordered(rows, arrows)
    left = min(x[n] - width_of(n) / 2 for n in x) - 18
    width = max(x[n] + width_of(n) / 2 for n in x) - left + 18
    canvas = Canvas(
        width,
        len(rows) * PITCH - PITCH + TALL + 44,
        "Components of the package; an arrow is an import.",
    )
    y = {n: 22 + i * PITCH for i, row in enumerate(reversed(rows)) for n in row}
    for arrow in arrows:
        points = [(x[n] - left, y[n]) for n in arrow]
        for (x0, y0), (x1, y1) in pairwise(points):
            canvas.curve(x0, y0 + TALL, x1, y1)
        for px, py in points[1:-1]:
            canvas.line([(px, py), (px, py + TALL)])
        canvas.tip(*points[-1], "down")
    for name in graph:
        canvas.rect(x[name] - left - BOX / 2, y[name], BOX, TALL, "box", 6)
        canvas.text(x[name] - left, y[name] + 21, name, "mid")
    return canvas
