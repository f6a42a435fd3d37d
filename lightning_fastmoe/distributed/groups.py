"""Process groups that are created once per process and reused by later runs.

A gloo group costs three threads and four file descriptors, an NCCL group device memory. A run can't
destroy its groups when it ends: a checkpoint may still be saved, and DeepSpeed keeps them.
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
    """The group for ``purpose``; every rank of the world must call this at the same point.

    Different purposes get different groups, so that their exchanges never interleave. Groups live
    as long as the world's group.

    Args:
        purpose: what is exchanged in the group. Users of one purpose must not overlap in time.
        ranks: its ranks; None is all.
        backend: the backend; None is the world's.
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


def own_group(
    purpose: str, partition: Sequence[Sequence[int]], timeout: timedelta | None
) -> dist.ProcessGroup | None:
    """Creates the groups for ``purpose``; every rank of the world must call this at the same point.

    Args:
        purpose: what is exchanged in the groups.
        partition: the ranks of each group; no rank is in two.
        timeout: the time limit of a collective; None is torch's default.

    Returns:
        The group that this rank is in, if any.
    """
    rank = dist.get_rank()
    own: dist.ProcessGroup | None = None
    for ranks in partition:
        group = lasting_group(purpose, ranks, timeout=timeout)
        if rank in ranks:
            own = group
    return own
