"""Ratios that README.md and the first table of docs/benchmarks.md give follow from its tables."""

from __future__ import annotations

import re

import pytest
from figures.tables import DOCS, table

PAGE = DOCS / "benchmarks.md"
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
Row = dict[str, str]


def numbers(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", cell)]


def ratios(rows: list[Row], above: str, below: str, part: int = -1) -> list[float]:
    return [numbers(row[above])[part] / numbers(row[below])[part] for row in rows]


def pairs(rows: list[Row], column: str) -> list[float]:
    """The first of a cell's two numbers over the second."""
    return [first / second for first, second in (numbers(row[column])[:2] for row in rows)]


def span(values: list[float]) -> tuple[str, str]:
    return f"{min(values):.2f}", f"{max(values):.2f}"


def beside(column: str, own: str, other: str) -> list[float]:
    """``own`` over ``other`` in a table with one line for each system, over both sizes."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| ranks |"))
    at = [cell.strip() for cell in header.split("|")].index(column)
    cells = [[c.strip() for c in line.split("|")] for line in lines]
    mine = [float(c[at]) for c in cells if len(c) > at and c[2] == own]
    theirs = [float(c[at]) for c in cells if len(c) > at and c[2] == other]
    return [a / b for a, b in zip(mine, theirs, strict=True)]


PEERS = table(PAGE, "ours", "SonicMoE", "plain torch", "ours to SonicMoE")
LAYER = table(PAGE, "T, D, F, E, K", "against plain torch")
MEMORY = "peak GiB over rest: ours, "
ENERGY = table(PAGE, "J per step")
TRAINING = table(PAGE, "tokens/s", "median step")
JOULES = {row[""]: numbers(row["J per step"])[0] for row in ENERGY}
SAVED = beside("durable, s", "this package", "DeepSpeed")
LOADED = beside("load, s", "this package", "DeepSpeed")

FIRST = [row["ratio"] for row in table(PAGE, "what", "beside", "ratio", "on")]
CLAIMS = [
    (0, [*span(ratios(PEERS, "ours", "SonicMoE")), *span(pairs(PEERS, MEMORY + "SonicMoE"))]),
    (
        1,
        [
            *span([numbers(row["against plain torch"])[0] for row in LAYER]),
            *span(pairs(LAYER, MEMORY + "plain torch")),
        ],
    ),
    (
        2,
        span(
            [
                joules / JOULES[name.replace("ours", "plain torch")]
                for name, joules in JOULES.items()
                if name.endswith("ours")
            ]
        ),
    ),
    (
        3,
        [
            f"{numbers(TRAINING[1]['tokens/s'].replace(',', ''))[0] / numbers(TRAINING[0]['tokens/s'].replace(',', ''))[0]:.2f}"
        ],
    ),
    (4, span(SAVED)),
    (5, span(LOADED)),
]


@pytest.mark.parametrize(("line", "expected"), CLAIMS)
def test_first_table_follows_from_the_others(line: int, expected: list[str]) -> None:
    assert re.findall(r"\d\.\d\d", FIRST[line]) == list(expected)


@pytest.mark.parametrize("line", range(len(CLAIMS)))
def test_tables_have_rows(line: int) -> None:
    assert len(PEERS) == 5
    assert len(LAYER) == 12
    assert len(SAVED) == len(LOADED) == 6
    assert FIRST[line]
