"""Output helpers of the verbs: JSON, tables, sizes, progress bars."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """Progress in bytes."""

    def total(self, size: int) -> None:
        """Sets the total."""

    def advance(self, size: int) -> None:
        """Adds to the bytes done."""


class _Silent:
    def total(self, size: int) -> None:
        pass

    def advance(self, size: int) -> None:
        pass


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def total(self, size: int) -> None:
        self._bar.reset(size)

    def advance(self, size: int) -> None:
        self._bar.update(size)


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Shows a progress bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield _Silent()
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        yield _Bar(bar)


def print_json(content: Any) -> None:
    """Prints one object to stdout; non-finite numbers become strings ("nan", "inf")."""
    sys.stdout.write(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def print_text(*lines: str) -> None:
    """Prints lines to stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def readable(size: int) -> str:
    """A size in bytes, with a unit."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def plural(count: int, what: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def size_in_bytes(size: str) -> int:
    """Parses ``5GB`` or ``200MiB`` to bytes, for argparse.

    Raises:
        ValueError: if it is not a valid size.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for unit, factor in units.items():
        if size.endswith(unit):
            value = int(float(size.removesuffix(unit)) * factor)
            break
    else:
        value = int(size)
    if value < 1:
        raise ValueError(size)
    return value
