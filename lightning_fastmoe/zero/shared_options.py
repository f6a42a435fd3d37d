"""What a step must do identically on all ranks: learning rate, weight decay, norm to clip by, ...

ZeRO has each rank update its part of the weights with its own optimizer. With other options on one
rank, such as the learning rate of a scheduler that follows a metric of its own, training goes on,
but one part of each weight is updated differently from the next.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_fastmoe.errors import ParameterGroupError
from lightning_fastmoe.zero.groups import is_tagged

_TOLERANCE = 1e-6
"""Relative; hosts with different mathematical libraries compute the same schedule to rounding."""


class SharedOptions:
    """Compares the options of an optimizer's groups over ranks.

    Args:
        optimizer: the user's.
        ep_rank: this rank's place in its expert parallel group. Groups of nothing but sharded
            experts are compared with those of their replicas only.
    """

    def __init__(self, optimizer: Optimizer, ep_rank: int) -> None:
        self._optimizer, self._ep_rank = optimizer, ep_rank
        self._is_dense = [
            not all(map(is_tagged, group["params"])) for group in optimizer.param_groups
        ]

    def digest(self, clip: float) -> int:
        """A number of 31 bits that differs where plain options of dense parameters' groups do.

        Tensors on other devices than the CPU are left out: to read them would wait for the device.

        Args:
            clip: the norm that this rank clips by, 0 for none.
        """
        text = f"{_rounded(float(clip))}\n" + "\n".join(
            f"{key} {_rounded(value)}"
            for group, is_dense in zip(self._optimizer.param_groups, self._is_dense, strict=True)
            if is_dense
            for key, value in sorted(group.items())
            if key != "params"
        )
        return zlib.crc32(text.encode()) >> 1

    def complaint(self, clip: float = 0.0) -> ParameterGroupError | None:
        """What differs between ranks, if anything does; collective, the same on every rank."""
        groups = self._optimizer.param_groups
        both = (
            [_plain(g) for g, is_dense in zip(groups, self._is_dense, strict=True) if is_dense],
            [_plain(g) for g, is_dense in zip(groups, self._is_dense, strict=True) if not is_dense],
        )
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self._ep_rank, *both, float(clip)))
        first_with: dict[int, int] = {}
        for rank, (ep_rank, dense, experts, norm) in enumerate(everyone):
            if not _same(everyone[0][3], norm):
                return ParameterGroupError(
                    f"Gradients are to be clipped by {everyone[0][3]:g} on rank 0 and by {norm:g}"
                    f" on rank {rank} (0 is not at all). The norm is that of all ranks' gradients,"
                    " and each rank clips its part, so set gradient_clip_val, or call"
                    " clip_gradients(), identically on every rank."
                )
            replica = first_with.setdefault(ep_rank, rank)
            message = _difference("", everyone[0][1], 0, dense, rank) or _difference(
                " of experts", everyone[replica][2], replica, experts, rank
            )
            if message:
                return ParameterGroupError(message)
        return None


def _difference(
    what: str, here: list[dict[str, Any]], first: int, there: list[dict[str, Any]], rank: int
) -> str:
    rule = (
        " Each rank updates its part of the weights with its own options, so they must be identical"
        " on every rank."
    )
    if len(here) != len(there):
        return (
            f"The optimizer has {len(here)} group(s){what} on rank {first} and {len(there)} on rank"
            f" {rank}.{rule}"
        )
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        for key in sorted(a.keys() | b.keys(), key=lambda key: (key != "lr", key)):
            if not _same(a.get(key), b.get(key)):
                return (
                    f"Option {key!r} of the optimizer's group {i}{what} is {a.get(key)!r} on rank"
                    f" {first} and {b.get(key)!r} on rank {rank}.{rule} A schedule must depend on"
                    " values that all ranks share, such as metrics logged with sync_dist=True."
                )
    return ""


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options without parameters, names and objects."""
    found = {key: _as_plain(value) for key, value in group.items() if key not in ("params", "name")}
    return {key: value for key, value in found.items() if value is not ...}


def _as_plain(value: Any) -> Any:
    """A value that can be sent and compared; ``...`` for one that can't."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() == 1 else ...
    if isinstance(value, tuple | list):
        items = [_as_plain(item) for item in value]
        return ... if ... in items else tuple(items)
    return value if value is None or isinstance(value, bool | int | float | str) else ...


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float | int):
        both_nan = math.isnan(a) and math.isnan(b)
        return both_nan or math.isclose(a, b, rel_tol=_TOLERANCE)
    return bool(a == b)


def _rounded(value: Any) -> str:
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, tuple | list):
        return " ".join(map(_rounded, value))
    return str(value) if value is None or isinstance(value, bool | int | str) else ""
