"""Strict reader for JSON files that may be forged; checks the type and range of each field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, cast

from lightning_fastmoe.errors import CheckpointError

MAX_INTEGER = 2**63 - 1
"""Largest count or size: all must fit into 64 bits."""


def load_json(data: bytes, where: object) -> dict[str, Any]:
    """Parses a JSON object: UTF-8 without a byte order mark, no duplicate keys, no NaN or overflow.

    Time and memory are linear in the size of ``data``, whatever it contains.

    Raises:
        CheckpointError: if ``data`` is not such an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: the key {twice!r} occurs twice.")
        return result

    def constant(text: str) -> Any:
        raise CheckpointError(f"{where}: {text} is not JSON.")

    def finite(text: str) -> float:
        value = float(text)
        if math.isinf(value):
            raise CheckpointError(f"{where}: {text[:40]} is larger than any floating-point number.")
        return value

    try:
        # Decoded here: json.loads would guess UTF-16 and UTF-32, and skip a byte order mark.
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=finite,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object.")
    return cast(dict[str, Any], value)


def is_a(value: Any, kind: type) -> bool:
    """``isinstance``, but a bool is not an int."""
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


class Fields:
    """Reads the fields of a JSON object one by one, and checks their types.

    Args:
        content: the object.
        where: its file, for messages.

    Raises:
        CheckpointError: by every method, naming the field.
    """

    def __init__(self, content: Any, where: object) -> None:
        if not isinstance(content, dict):
            raise CheckpointError(f"{where}: expected an object, found {str(content)[:80]}.")
        self.content, self.where, self.left = content, where, set(content)

    def get(self, name: str, kind: type) -> Any:
        """The value of a required field."""
        if not is_a(self.content.get(name), kind):
            raise CheckpointError(
                f"{self.where}: the field {name!r} is missing or not of type {kind.__name__}."
            )
        self.left.discard(name)
        return self.content[name]

    def optional(self, name: str, kind: type) -> Any:
        """The value of a required field that may be null."""
        if name in self.content and self.content[name] is None:
            self.left.discard(name)
            return None
        return self.get(name, kind)

    def any(self, name: str) -> Any:
        """The value of a required field of any type."""
        if name not in self.content:
            raise CheckpointError(f"{self.where}: the field {name!r} is missing.")
        self.left.discard(name)
        return self.content[name]

    def count(self, name: str, least: int = 0) -> int:
        """An integer of at least ``least`` that fits into 64 bits."""
        value: int = self.get(name, int)
        self._check_range(name, value, least)
        return value

    def strings(self, name: str) -> list[str]:
        """A list of distinct strings."""
        values = self.get(name, list)
        self._check_all(name, values, str)
        if len(set(values)) != len(values):
            raise CheckpointError(f"{self.where}: the field {name!r} lists an entry twice.")
        return list(values)

    def names(self, name: str) -> dict[str, str]:
        """A map of strings."""
        value = self.get(name, dict)
        self._check_all(name, value.values(), str)
        return dict(value)

    def counts(self, name: str, least: int = 0) -> dict[str, int]:
        """A map of integers of at least ``least`` that fit into 64 bits."""
        value = self.get(name, dict)
        self._check_all(name, value.values(), int)
        for number in value.values():
            self._check_range(name, number, least)
        return dict(value)

    def lists(self, name: str) -> dict[str, list[Any]]:
        """A map of lists."""
        value = self.get(name, dict)
        self._check_all(name, value.values(), list)
        return dict(value)

    def nothing_else(self) -> None:
        """Refuses fields that were not read."""
        if self.left:
            raise CheckpointError(
                f"{self.where}: unknown fields {sorted(self.left)[:4]}. This version does not know"
                " what they mean."
            )

    def _check_all(self, name: str, values: Iterable[Any], kind: type) -> None:
        if not all(is_a(v, kind) for v in values):
            raise CheckpointError(
                f"{self.where}: the field {name!r} is not of type {kind.__name__}."
            )

    def _check_range(self, name: str, value: int, least: int) -> None:
        if not least <= value <= MAX_INTEGER:
            raise CheckpointError(
                f"{self.where}: the field {name!r} holds {str(value)[:40]}, which must be"
                f" {least} to 2^63 - 1."
            )
