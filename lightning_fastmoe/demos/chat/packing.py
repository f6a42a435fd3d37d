"""Distributes examples of different lengths over rows of one length."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Indices of the examples that share a row, for each row.

    The longest come first, each into the row that it fills best (best fit decreasing, which needs
    at most 11/9 of the fewest rows, plus one).

    Args:
        lengths: of the examples, each at most ``row``.
        row: the length of a row.

    Raises:
        ValueError: if an example is longer than a row.
    """
    if lengths and max(lengths) > row:
        raise ValueError(f"an example of {max(lengths)} tokens doesn't fit into a row of {row}")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens that are free, index of the row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[i], -1))
        if at == len(free):
            rows.append([])
            left, index = row, len(rows) - 1
        else:
            left, index = free.pop(at)
        rows[index].append(i)
        bisect.insort(free, (left - lengths[i], index))
    return rows
