"""The file with counts of experts chosen together: ``co_activation.json``.

One JSON object; each write replaces the previous one::

    {"format": "lightning_fastmoe.co_activation", "version": 1,
     "first_step": 400, "last_step": 449,     step numbers as in the loggers
     "layers": [{"name": "blocks.0.moe", "num_experts": 8,
                 "together": [[1021, 130, ...], ...]}, ...]}

``together[i][j]`` counts the tokens that chose both experts i and j, over all ranks and
micro-batches of these steps and before any capacity; ``together[i][i]`` those that chose i.

This module imports only the standard library, so that reading the file is fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fastmoe.errors import DataError

FILE_NAME = "co_activation.json"
FORMAT = "lightning_fastmoe.co_activation"
VERSION = 1


@dataclass(frozen=True)
class LayerCoActivation:
    """One MoE layer.

    Attributes:
        name: the name of the layer.
        together: E rows of E counts.
    """

    name: str
    together: list[list[int]]


@dataclass(frozen=True)
class CoActivationLog:
    """The whole file."""

    first_step: int
    last_step: int
    layers: list[LayerCoActivation]


def write(folder: str | Path, log: CoActivationLog) -> Path:
    """Writes the file atomically, so that a crash leaves the old one or the new one."""
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"name": x.name, "num_experts": len(x.together), "together": x.together} for x in log.layers
    ]
    value = {
        "format": FORMAT,
        "version": VERSION,
        "first_step": log.first_step,
        "last_step": log.last_step,
        "layers": layers,
    }
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def read(path: str | Path) -> CoActivationLog:
    """Reads a file.

    Raises:
        DataError: if it is not such a file, is damaged, or has a later version.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8", errors="replace"))
        if found["format"] != FORMAT:
            raise ValueError("unknown format")
        if found["version"] != VERSION:
            raise DataError(
                f"{path} has format version {found['version']}, but this release reads version"
                f" {VERSION}. Use the release that wrote it."
            )
        layers = [_layer(x) for x in found["layers"]]
        return CoActivationLog(int(found["first_step"]), int(found["last_step"]), layers)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a valid co-activation file: {error}.") from error


def _layer(found: Any) -> LayerCoActivation:
    experts = int(found["num_experts"])
    rows = found["together"]
    if len(rows) != experts or any(len(row) != experts for row in rows):
        raise ValueError(f"{found['name']} does not have {experts} x {experts} counts")
    return LayerCoActivation(str(found["name"]), [[int(n) for n in row] for row in rows])


def shares(together: Sequence[Sequence[int]]) -> list[list[float | None]]:
    """``together[i][j] / together[i][i]``, the fraction of i's tokens that also chose j.

    None on the diagonal, and in rows of experts without tokens.
    """
    return [
        [None if i == j or not row[i] else n / row[i] for j, n in enumerate(row)]
        for i, row in enumerate(together)
    ]
