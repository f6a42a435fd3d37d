"""Decodes and checks ``state.json`` and ``rank_NNNNN.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_fastmoe.checkpoint.format.json_file import MAX_INTEGER, Fields, is_a, load_json
from lightning_fastmoe.checkpoint.format.json_values import Sized, decode
from lightning_fastmoe.errors import CheckpointError

COUNTS = "layers"
"""Key of the MoE layers' counts since the last step in ``rank_NNNNN.json``."""


def decode_state(
    data: bytes, objects: Sized, contents: Sequence[str], where: object
) -> dict[str, Any]:
    """Decodes ``state.json``.

    Args:
        data: the file's bytes.
        objects: the objects that JSON could not hold.
        contents: the manifest's ``contents``.
        where: the file's path, for messages.

    Raises:
        CheckpointError: if it is invalid JSON, or a field is missing or of the wrong type.
    """
    value = _decoded(data, objects, where)
    read = Fields(value, where)
    read.get("lightning", dict)
    read.get("extra_state", dict)
    optimizer, engine = read.optional("optimizer", dict), read.optional("engine", dict)
    read.nothing_else()
    expected = "optimizer" in contents
    if (optimizer is not None, engine is not None) != (expected, expected):
        raise CheckpointError(
            f"{where} {'lacks the' if expected else 'holds an'} optimizer or engine, but the"
            f" manifest's contents is {list(contents)}: they belong to different checkpoints."
        )
    if optimizer is not None and engine is not None:
        _check_optimizer(optimizer, f"{where}: optimizer")
        _check_engine(engine, f"{where}: engine")
    return value


def decode_rank_state(data: bytes, objects: Sized, where: object) -> dict[str, Any]:
    """Decodes ``rank_NNNNN.json``.

    Raises:
        CheckpointError: as :func:`decode_state`.
    """
    value = _decoded(data, objects, where)
    read = Fields(value, where)
    read.get("rng", dict)
    read.any("loaders")
    if COUNTS in value:  # missing in checkpoints of earlier versions
        for layer, row in read.get(COUNTS, dict).items():
            _check_counts(row, f"{where}: {COUNTS}: {layer}")
    read.nothing_else()
    return value


def _decoded(data: bytes, objects: Sized, where: object) -> dict[str, Any]:
    try:
        value = decode(load_json(data, where), objects, where)
    except RecursionError as error:
        raise CheckpointError(f"{where} is nested too deeply: don't load it.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object.")
    return value


def _check_counts(value: Any, where: str) -> None:
    read = Fields(value, where)
    read.get("nonfinite", bool)
    load = read.optional("load", list)
    if not all(is_a(n, int) and 0 <= n <= MAX_INTEGER for n in load or ()):
        raise CheckpointError(f"{where}: the field 'load' must hold counts, 0 to 2^63 - 1.")
    read.nothing_else()


def _check_optimizer(value: dict[str, Any], where: str) -> None:
    read = Fields(value, where)
    read.get("class", str)
    for name, key in (("groups", "options"), ("user_groups", "options"), ("scalars", "values")):
        for row in read.get(name, list):
            here = Fields(row, f"{where}: {name}")
            here.strings("params")
            here.get(key, dict)
            here.nothing_else()
    if "trained_experts" in value:  # only where single experts are trained
        for ids in read.lists("trained_experts").values():
            if not all(is_a(i, int) and 0 <= i <= MAX_INTEGER for i in ids):
                raise CheckpointError(f"{where}: 'trained_experts' must hold ids of experts.")
    read.nothing_else()


def _check_engine(value: dict[str, Any], where: str) -> None:
    read = Fields(value, where)
    read.counts("counters")
    read.get("loss_scaler", dict)
    read.nothing_else()
