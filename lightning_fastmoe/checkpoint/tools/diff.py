"""Compares two checkpoints tensor by tensor, through two small buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.shards import chunks

_ELEMENTS = 2**21
"""Number of values compared at a time, in fp64: 16 MiB for each of a few buffers."""


@dataclass(frozen=True)
class Difference:
    """How a tensor differs between two checkpoints.

    Attributes:
        tensor: name of the tensor.
        kind: "only in first", "only in second", "shape", "dtype" or "values".
        detail: the shapes or dtypes; "" for values.
        elements: number of elements that differ in value; 0 if the shapes differ.
        max_abs: the largest ``|a - b|``; inf where one is NaN or infinite and the other is not.
        max_rel: the largest ``|a - b| / max(|a|, |b|)``, between 0 and 2, or inf as above.
    """

    tensor: str
    kind: str
    detail: str = ""
    elements: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0


def compare(
    first: CheckpointReader,
    second: CheckpointReader,
    *,
    prefix: str = "",
    atol: float = 0.0,
    rtol: float = 0.0,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[Difference]:
    """The tensors that differ, sorted by name.

    Without a tolerance, values are compared bit by bit: -0.0 differs from 0.0, and NaN equals only
    the same NaN. With one, they differ if ``|a - b| > atol + rtol * max(|a|, |b|)``, and any NaN
    equals any other.

    Args:
        first: a checkpoint.
        second: another checkpoint.
        prefix: compare only tensors whose names have this prefix.
        atol: absolute tolerance.
        rtol: relative tolerance.
        on_bytes: called after each step with the number of bytes compared, counted in ``first``.
    """
    a, b = first.manifest.tensors, second.manifest.tensors
    for name in sorted({*a, *b}):
        if not name.startswith(prefix):
            continue
        if name not in b:
            yield Difference(name, "only in first", _describe(a[name]))
        elif name not in a:
            yield Difference(name, "only in second", _describe(b[name]))
        elif a[name].shape != b[name].shape:
            yield Difference(name, "shape", f"{list(a[name].shape)} and {list(b[name].shape)}")
        else:
            found = _compare_values(first, second, name, atol, rtol, on_bytes)
            if a[name].dtype != b[name].dtype:
                detail = f"{a[name].dtype} and {b[name].dtype}"
                yield Difference(name, "dtype", detail, *found)
            elif found[0]:
                yield Difference(name, "values", "", *found)


def bytes_to_compare(first: CheckpointReader, second: CheckpointReader, prefix: str = "") -> int:
    """Total number of bytes that :func:`compare` will report to ``on_bytes``."""
    a, b = first.manifest.tensors, second.manifest.tensors
    shared = (n for n in a if n in b and n.startswith(prefix) and a[n].shape == b[n].shape)
    return sum(a[n].size for n in shared)


def _describe(record: TensorRecord) -> str:
    return f"{record.dtype} {list(record.shape)}"


def _compare_values(
    first: CheckpointReader,
    second: CheckpointReader,
    name: str,
    atol: float,
    rtol: float,
    on_bytes: Callable[[int], None] | None,
) -> tuple[int, float, float]:
    """(number of elements that differ, largest absolute difference, largest relative one)."""
    records = [reader.record(name) for reader in (first, second)]
    buffers = [torch.empty(min(_ELEMENTS, r.numel), dtype=DTYPES[r.dtype]) for r in records]
    differ, max_abs, max_rel = 0, 0.0, 0.0
    for begin, end in chunks(0, records[0].numel, _ELEMENTS):
        parts = [buffer[: end - begin] for buffer in buffers]
        for reader, part in zip((first, second), parts, strict=True):
            reader.read_into(name, begin, part)
        if not _bit_equal(parts[0], parts[1]):
            count, largest, relative = _distance(parts[0], parts[1], atol, rtol)
            differ, max_abs, max_rel = (
                differ + count,
                max(max_abs, largest),
                max(max_rel, relative),
            )
        if on_bytes is not None:
            on_bytes((end - begin) * records[0].size // records[0].numel)
    return differ, max_abs, max_rel


def _bit_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _distance(a: Tensor, b: Tensor, atol: float, rtol: float) -> tuple[int, float, float]:
    exact = atol == rtol == 0
    unequal = _unequal_bits(a, b) if exact and a.dtype == b.dtype else None
    x, y = a.to(torch.float64), b.to(torch.float64)
    same = (x == y) | (x.isnan() & y.isnan())
    gap = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    size = torch.maximum(x.abs(), y.abs())
    relative = torch.where(gap == 0, 0.0, gap / size).nan_to_num(nan=math.inf, posinf=math.inf)
    if unequal is None:
        allowed = (atol + rtol * size).nan_to_num(nan=0.0, posinf=0.0)
        unequal = gap > allowed
    return int(unequal.sum()), float(gap.max()), float(relative.max())


def _unequal_bits(a: Tensor, b: Tensor) -> Tensor:
    size = a.element_size()
    rows = [t.view(torch.uint8).view(-1, size) for t in (a, b)]
    return (rows[0] != rows[1]).any(dim=1)
