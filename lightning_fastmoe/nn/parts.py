"""Properties that forward to an attribute of one of an object's parts."""

from __future__ import annotations

from typing import Any


def part_of(owner: str, name: str, doc: str) -> Any:
    """A property that reads and writes attribute ``name`` of the object's attribute ``owner``."""

    def get(self: Any) -> Any:
        return getattr(getattr(self, owner), name)

    def put(self: Any, value: Any) -> None:
        setattr(getattr(self, owner), name, value)

    return property(get, put, doc=doc)
