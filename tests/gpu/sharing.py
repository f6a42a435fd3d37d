"""Several ranks over NCCL, on as many GPUs as there are.

Where each rank has a GPU, all are on one node. Otherwise each is on a node of its own, as far as it
knows, and uses the first GPU: NCCL goes through sockets then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_fastmoe.testing import RankPool


def run(
    pool: RankPool, function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """:meth:`RankPool.run`; ranks that share a GPU take turns, so give them time."""
    return pool.run(function, world, *args, timeout=timeout, ranks_per_node=ranks_per_node(world))


def ranks_per_node(world: int) -> int | None:
    """What :meth:`RankPool.run` is told."""
    return None if torch.cuda.device_count() >= world else 1
