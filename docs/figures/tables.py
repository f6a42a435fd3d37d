"""The tables of a Markdown page, so that a number of a picture or of README.md is typed once."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]


def cells(line: str) -> list[str]:
    """The cells of one line of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(page: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of the first table of ``page`` whose header has all of ``columns``.

    Returns:
        One dict for each row, column -> text.

    Raises:
        LookupError: if there is none.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    for start, line in enumerate(lines):
        if not line.startswith("|") or not set(columns) <= set(cells(line)):
            continue
        header, rows = cells(line), []
        for row in lines[start + 2 :]:
            if not row.startswith("|"):
                break
            rows.append(dict(zip(header, cells(row), strict=True)))
        return rows
    raise LookupError(f"{page.name} has no table with the columns {', '.join(columns)}.")


def last_number(text: str) -> float | None:
    """The last number of a cell such as "405, 412"; None for "not offered" or an empty cell."""
    try:
        return float(text.split(",")[-1].strip().removesuffix("x"))
    except ValueError:
        return None
