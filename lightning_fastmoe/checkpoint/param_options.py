"""Optimizer options and scalar states, by group and by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import CheckpointError

_NOT_OPTIONS = ("params", "name", "moe")


@dataclass(frozen=True)
class NamedGroup:
    """Options of an optimizer's parameter group, and the names of its parameters."""

    params: list[str]
    options: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """The group as JSON data."""
        return {"params": self.params, "options": self.options}


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options; tensors are copied, because optimizers change them in place."""
    return {
        k: v.detach().clone() if isinstance(v, Tensor) else v
        for k, v in group.items()
        if k not in _NOT_OPTIONS and not k.startswith("_")
    }


def by_parameter(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Parameter name -> what the row that lists it has under ``key``."""
    return {name: row[key] for row in rows for name in row["params"]}


def common(
    names: Iterable[str], values: Mapping[str, dict[str, Any]], what: str, where: object
) -> dict[str, Any] | None:
    """The value that all of the given parameters must share; None if they have none.

    Raises:
        CheckpointError: naming two parameters that differ.
    """
    first: str | None = None
    for name in names:
        if name not in values:
            continue
        if first is None:
            first = name
        elif not same(values[first], values[name]):
            raise CheckpointError(
                f"{where}: {what} of {first!r} and {name!r} differ ({values[first]} and"
                f" {values[name]}), but this optimizer has them in one group. Put them into"
                " different groups, as in the run that saved."
            )
    return None if first is None else values[first]


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, including tensors inside dictionaries."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def restored(value: Any, like: Any) -> Any:
    """A copy of a saved option or scalar; tensors go to the device of the current one."""
    if isinstance(value, Tensor):
        device = like.device if isinstance(like, Tensor) else "cpu"
        return value.clone().to(device)
    return value
