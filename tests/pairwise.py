"""A few of many combinations of parameters, in which every two values still meet.

Where a test is run for each of several worlds, stages, dtypes and models, nearly all that breaks
does so for one value or for two that meet: a product of all axes repeats each such pair many times.
By default, a test with @combinations or @covering runs some rows of its product, so that each value
and each pair of values of two axes occurs. ``pytest --all-combinations`` runs all rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import combinations as choices
from itertools import product
from typing import Any

import pytest

OPTION = "--all-combinations"
MARK = "combinations"
TRIES = 20
Key = tuple[Hashable, ...]
Parts = tuple[tuple[int, Hashable], ...]


def cover(keys: Sequence[Key]) -> list[int]:
    """The places of a few of ``keys``, in order, that have all pairs of values that any has.

    The last one is always among them: axes are to name their most demanding value last. Then
    follows, as long as pairs are missing, one of those that have most of them. Which of these makes
    the set smallest is not known before, so several orders are tried, the same ones each time.

    Args:
        keys: what each row stands for, a value on each axis.
    """
    parts = [set(_parts(key)) for key in keys]
    order = list(range(len(keys)))
    found = [_greedy(parts, order)]
    for seed in range(TRIES):
        random.Random(seed).shuffle(order)  # noqa: S311  nothing secret
        found.append(_greedy(parts, order))
    return min(found, key=len)


def _greedy(parts: Sequence[set[Parts]], order: Sequence[int]) -> list[int]:
    chosen, missing = [len(parts) - 1], set().union(*parts) - parts[-1]
    while missing:
        best = max(order, key=lambda i: len(parts[i] & missing))
        chosen.append(best)
        missing -= parts[best]
    return sorted(chosen)


def _parts(key: Key) -> Iterator[Parts]:
    return choices(enumerate(key), 2)


def combinations(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises a test with the product of ``axes``, or with some of it: see the module."""
    indices = list(product(*(range(len(values)) for values in axes.values())))
    rows = [
        tuple(values[i] for values, i in zip(axes.values(), row, strict=True)) for row in indices
    ]
    return pytest.mark.combinations(",".join(axes), rows, cover(indices), None)


def covering(
    names: str,
    rows: Sequence[Any],
    by: Callable[[Any], Key] = tuple,
    ids: Callable[[Any], str] | None = None,
) -> pytest.MarkDecorator:
    """Parametrises a test with ``rows``, or with some that have the pairs of values of all.

    Args:
        names: as of pytest.mark.parametrize, and so are ``rows`` and ``ids``.
        by: the values of a row, one for each axis.
    """
    return pytest.mark.combinations(names, rows, cover([by(row) for row in rows]), ids)


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Does so for the marks of a test."""
    for mark in metafunc.definition.iter_markers(MARK):
        names, rows, some, ids = mark.args
        if not metafunc.config.getoption(OPTION):
            rows = [rows[i] for i in some]
        metafunc.parametrize(names, rows, ids=ids)
