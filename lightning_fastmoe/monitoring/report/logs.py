"""Reads a run's logs: metrics.csv, TensorBoard's event files, the monitors' files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lightning_fastmoe.errors import DataError
from lightning_fastmoe.monitoring.logs import co_activation as co_activation_log
from lightning_fastmoe.monitoring.logs import expert_load as load_log

CSV_NAME = "metrics.csv"
EVENTS = "events.out.tfevents.*"

Series = list[tuple[int, float]]
"""(step, value), steps ascending."""


@dataclass
class Run:
    """The logs found in a run's folder.

    Attributes:
        folder: the folder.
        scalars: name -> series.
        loads: the loads of every expert; None without the monitor's file.
        co_activation: counts of experts chosen together; None without that monitor's file.
        notes: sentences about what is missing or was left out.
    """

    folder: Path
    scalars: dict[str, Series] = field(default_factory=dict)
    loads: load_log.LoadLog | None = None
    co_activation: co_activation_log.CoActivationLog | None = None
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Reads a run's folder, or the latest ``version_*`` in it.

    Raises:
        DataError: if the folder is missing or has no logs, or a log is damaged.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}: give the folder that a run's logger wrote into.")
    run = Run(folder)
    if not _has_logs(folder):
        versions = sorted(filter(_has_logs, folder.glob("version_*")), key=_version)
        if not versions:
            raise DataError(
                f"{folder} has no logs: neither {CSV_NAME}, {load_log.FILE_NAME}, nor"
                " TensorBoard's event files. Give the folder that a run's logger wrote into, such"
                " as runs/tiny_lm/version_0."
            )
        run.folder = versions[-1]
        if len(versions) > 1:
            run.notes.append(
                f"{folder} has {len(versions)} runs; this is the latest, {versions[-1].name}."
            )
    if (table := run.folder / CSV_NAME).is_file():
        _merge(run.scalars, _read_csv(table))
    if any(run.folder.glob(EVENTS)):
        _read_events(run)
    if (path := run.folder / load_log.FILE_NAME).is_file():
        run.loads = load_log.read(path)
    if (path := run.folder / co_activation_log.FILE_NAME).is_file():
        run.co_activation = co_activation_log.read(path)
    return run


def _has_logs(folder: Path) -> bool:
    named = (folder / CSV_NAME, folder / load_log.FILE_NAME)
    return any(path.is_file() for path in named) or any(folder.glob(EVENTS))


def _version(folder: Path) -> tuple[int, str]:
    number = folder.name.removeprefix("version_")
    return (int(number) if number.isdigit() else -1, folder.name)


def _read_csv(path: Path) -> dict[str, Series]:
    """Lightning's CSVLogger: a column per name, and the step; cells may be empty."""
    found: dict[str, Series] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or "step" not in rows.fieldnames:
            raise DataError(f"{path} has no column 'step', so CSVLogger didn't write it.")
        for row in rows:
            step = _number(row["step"])
            if step is None:
                continue
            for name, cell in row.items():
                value = _number(cell)
                if name not in ("step", "epoch", None) and value is not None:
                    found.setdefault(name, []).append((int(step), value))
    return found


def _number(cell: object) -> float | None:
    """The number in a cell; None if it is empty or text. NaN is a number."""
    try:
        return float(cell) if isinstance(cell, str) else None
    except ValueError:
        return None


def _read_events(run: Run) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        run.notes.append(
            "TensorBoard's event files were not read: tensorboard is not installed"
            " (pip install tensorboard)."
        )
        return
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name != "epoch"
    }
    _merge(run.scalars, found)


def _merge(into: dict[str, Series], found: dict[str, Series]) -> None:
    """Merges series, sorted by step; of several values for one step, the last."""
    for name, series in found.items():
        if series:
            into[name] = sorted(dict([*into.get(name, []), *series]).items())


def matching(scalars: dict[str, Series], names: Iterable[str]) -> dict[str, Series]:
    """The series of these names, also with Lightning's ``_step`` and ``_epoch`` suffixes.

    Prefers ``name_step`` to ``name`` to ``name_epoch``.
    """
    found = {}
    for name in names:
        for candidate in (f"{name}_step", name, f"{name}_epoch"):
            if candidate in scalars:
                found[name] = scalars[candidate]
                break
    return found


def finite(series: Series) -> Series:
    """The series without NaN and Inf, which charts can't show."""
    return [(step, value) for step, value in series if math.isfinite(value)]
