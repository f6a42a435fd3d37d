"""Observers see the routing of each forward pass of a layer: metrics, logs and callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_fastmoe.nn.router import Routing

RoutingObserver = Callable[[Any, Routing], None]
"""Called with the layer once per forward pass, without gradients; not when a pass is replayed."""


@torch.no_grad()
def show_observers(layer: Any, routing: Routing) -> None:
    """Calls the observers of ``layer``, a :class:`~lightning_fastmoe.nn.MoE`."""
    for observer in list(layer._observers.values()):
        observer(layer, routing)
