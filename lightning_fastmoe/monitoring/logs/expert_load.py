"""The log file of expert loads: ``expert_load.jsonl``.

One JSON object per line. The first one describes the layers::

    {"format": "lightning_fastmoe.expert_load", "version": 1,
     "layers": [{"name": "blocks.0.moe", "num_experts": 8}, ...]}

Each other line covers the steps since the previous line, over all ranks and micro-batches, with one
entry per layer in order; null for a layer that saw no token::

    {"step": 9,                      step number as in the loggers
     "tokens": [4096, ...],
     "routed": [[1021, ...], ...],   (token, expert) pairs before any capacity, per expert
     "kept": [null, ...],            pairs that reached their expert; null: all of them
     "entropy": [1.93, ...],         of a token's scores, mean over tokens, nats
     "confidence": [0.31, ...]}      a token's best score, mean over tokens

``routed`` and ``kept`` are counts, so lines can be summed. Steps ascend.

This module imports only the standard library, so that reading a log is fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_fastmoe.errors import DataError

FILE_NAME = "expert_load.jsonl"
FORMAT = "lightning_fastmoe.expert_load"
VERSION = 1


@dataclass(frozen=True)
class Layer:
    """One MoE layer of the log."""

    name: str
    num_experts: int


@dataclass(frozen=True)
class Record:
    """One line; each list has an entry per layer."""

    step: int
    tokens: list[int | None]
    routed: list[list[int] | None]
    kept: list[list[int] | None]
    entropy: list[float | None]
    confidence: list[float | None]


@dataclass
class LoadLog:
    """A whole file."""

    layers: list[Layer]
    records: list[Record] = field(default_factory=list)


class LoadLogWriter:
    """Appends to the file of a run; for a single process.

    Existing lines from ``first_step`` on come from a run that continued past the checkpoint from
    which this one resumes. They are dropped, as is a truncated line. A file about other layers is
    renamed to ``expert_load.<n>.jsonl``.

    Args:
        folder: the folder of the run; created if missing.
        layers: the layers of the model.
        first_step: the earliest step that will be written.
    """

    def __init__(self, folder: str | Path, layers: Sequence[Layer], first_step: int) -> None:
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        log = LoadLog(list(layers))
        if self.path.exists():
            try:
                before = read(self.path)
            except DataError:
                before = LoadLog([])
            if before.layers == log.layers:
                log.records = [r for r in before.records if r.step < first_step]
            else:
                self.path.rename(_unused(self.path))
        # Atomically, so that a crash leaves the old file or the new one.
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join([_header(log.layers), *map(_line, log.records)]), encoding="utf-8")
        os.replace(draft, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends a line and flushes it to the operating system."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read(path: str | Path) -> LoadLog:
    """Reads a file; a truncated last line is ignored.

    Raises:
        DataError: if it is not such a file, is damaged, or has a later version.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        header = json.loads(lines[0])
        if header["format"] != FORMAT:
            raise ValueError("unknown format")
        layers = [Layer(str(x["name"]), int(x["num_experts"])) for x in header["layers"]]
        version = header["version"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{path} is not a log of expert loads: its first line should describe the layers."
        ) from error
    if version != VERSION:
        raise DataError(
            f"{path} has format version {version}, but this release reads version {VERSION}. Use"
            " the release that wrote it."
        )
    log = LoadLog(layers)
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = _record(json.loads(line), layers)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is damaged: {error}.") from error
        if log.records and record.step <= log.records[-1].step:
            raise DataError(
                f"{path}, line {number} has step {record.step} after step"
                f" {log.records[-1].step}. Steps must ascend; two runs may have written into one"
                " folder at the same time."
            )
        log.records.append(record)
    return log


def _record(found: Any, layers: list[Layer]) -> Record:
    record = Record(
        int(found["step"]),
        found["tokens"],
        found["routed"],
        found["kept"],
        found["entropy"],
        found["confidence"],
    )
    for name in ("tokens", "routed", "kept", "entropy", "confidence"):
        if len(getattr(record, name)) != len(layers):
            raise ValueError(f"{name} does not have {len(layers)} entries")
    for counts in (record.routed, record.kept):
        for layer, row in zip(layers, counts, strict=True):
            if row is not None and len(row) != layer.num_experts:
                raise ValueError(f"{layer.name} does not have {layer.num_experts} counts")
    return record


def _header(layers: Sequence[Layer]) -> str:
    described = [{"name": x.name, "num_experts": x.num_experts} for x in layers]
    return _dump({"format": FORMAT, "version": VERSION, "layers": described})


def _line(record: Record) -> str:
    rounded = {
        name: [None if x is None else round(x, 6) for x in getattr(record, name)]
        for name in ("entropy", "confidence")
    }
    return _dump({**vars(record), **rounded})


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


def _unused(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate


@dataclass(frozen=True)
class Span:
    """Loads summed over consecutive lines.

    Attributes:
        first_step: the step of the first line.
        last_step: the step of the last line.
        routed: counts per layer and expert; None for a layer without tokens.
    """

    first_step: int
    last_step: int
    routed: list[list[int] | None]


def spans(records: Sequence[Record]) -> list[Span]:
    """One span for each line."""
    return [Span(r.step, r.step, r.routed) for r in records]


def merged(parts: Sequence[Span], limit: int) -> list[Span]:
    """At most ``limit`` spans, each the sum of equally many consecutive ones (the last fewer)."""
    if not parts:
        return []
    size = -(-len(parts) // limit)
    return [total(parts[i : i + size]) for i in range(0, len(parts), size)]


def total(parts: Sequence[Span]) -> Span:
    """The sum of at least one span."""
    routed: list[list[int] | None] = []
    for layer in range(len(parts[0].routed)):
        rows = [row for part in parts if (row := part.routed[layer]) is not None]
        routed.append([sum(column) for column in zip(*rows, strict=True)] if rows else None)
    return Span(parts[0].first_step, parts[-1].last_step, routed)


def ratios(counts: Sequence[int] | None) -> list[float] | None:
    """Load ratios: each count over the mean count; None without tokens."""
    if counts is None or not (whole := sum(counts)):
        return None
    return [n * len(counts) / whole for n in counts]
