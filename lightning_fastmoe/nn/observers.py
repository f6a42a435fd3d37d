"""Observers see the routing of each forward pass of a layer: metrics, logs and callbacks."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.nn.router import Routing

RoutingObserver = Callable[[Any, Routing], None]
"""Called with the layer once per forward pass, without gradients; not when a pass is replayed."""


class _Handle(RemovableHandle):
    """Removes its own observer alone: another one may have its number later.

    Layers number their observers from 0. Compilers look at the numbers, so layers with the same
    callbacks share a graph, and fits that come and go don't ask for new ones.
    """

    def __init__(
        self, observers: OrderedDict[int, RoutingObserver], observer: RoutingObserver
    ) -> None:
        super().__init__(observers)
        self.id = next(n for n in itertools.count() if n not in observers)
        observers[self.id] = self._observer = observer

    def remove(self) -> None:
        observers = self.hooks_dict_ref()
        if observers is not None and observers.get(self.id) is self._observer:
            super().remove()


def add_observer(
    observers: OrderedDict[int, RoutingObserver], observer: RoutingObserver
) -> RemovableHandle:
    """Adds an observer to those of a layer; the handle removes it."""
    return _Handle(observers, observer)


@torch.no_grad()
def show_observers(layer: Any, routing: Routing) -> None:
    """Calls the observers of ``layer``, a :class:`~lightning_fastmoe.nn.MoE`."""
    for observer in list(layer._observers.values()):
        observer(layer, routing)
