"""Process groups that are made once per process and used again by every later run.

A gloo group costs three threads and four descriptors, an NCCL group memory on the device. A run
can't destroy its groups when it ends: its checkpoint may yet be saved, and DeepSpeed keeps them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_made: dict[Any, Any] = {}
_world: list[Any] = []


def lasting_group(
    purpose: str,
    ranks: Sequence[int] | None = None,
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> dist.ProcessGroup:
    """The group for ``purpose``; every rank of the world calls this at the same point.

    Groups of different purposes are different ones, so that what is exchanged in one never comes
    between what is exchanged in another. They live as long as the world's group.

    Args:
        purpose: what is exchanged in it. Users of one purpose follow each other.
        ranks: its ranks; None is all.
        backend: None is the world's.
        timeout: the time limit of a collective; None is torch's default.
    """
    world = dist.group.WORLD
    if not _world or _world[0]() is not world:
        _made.clear()
        _world[:] = [weakref.ref(world)]
    key = (purpose, None if ranks is None else tuple(ranks), backend, timeout)
    if key not in _made:
        members = None if ranks is None else list(ranks)
        _made[key] = dist.new_group(members, backend=backend, timeout=timeout)
    group: dist.ProcessGroup = _made[key]
    return group
