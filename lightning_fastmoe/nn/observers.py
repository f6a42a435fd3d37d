"""Observers see the routing of each forward pass of a layer: metrics, logs and callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.nn.router import Routing

RoutingObserver = Callable[[Any, Routing], None]
"""Called with the layer once per forward pass, without gradients; not when a pass is replayed."""


def add_observer(layer: Any, observer: RoutingObserver) -> RemovableHandle:
    """Adds an observer to ``layer``, a :class:`~lightning_fastmoe.nn.MoE`; the handle removes it.

    Each layer numbers its own: compilers look at the numbers, and layers that have the same
    callbacks are to share a graph.
    """
    handle = RemovableHandle(layer._observers)
    handle.id, layer._observers_added = layer._observers_added, layer._observers_added + 1
    layer._observers[handle.id] = observer
    return handle


@torch.no_grad()
def show_observers(layer: Any, routing: Routing) -> None:
    """Calls the observers of ``layer``, a :class:`~lightning_fastmoe.nn.MoE`."""
    for observer in list(layer._observers.values()):
        observer(layer, routing)
