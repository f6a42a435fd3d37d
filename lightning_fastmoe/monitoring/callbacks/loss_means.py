"""Means of the layers' balancing losses over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.router.losses import LOSSES


class LossMeans:
    """Sums of each layer's losses and of how often each was computed.

    Args:
        layers: the layers with their names.
        device: where their losses are.

    Attributes:
        packed: (2 * layers * losses,) fp64, sums and then counts: to be summed over ranks.
    """

    def __init__(self, layers: Sequence[tuple[str, MoE]], device: torch.device) -> None:
        self._layers = list(layers)
        self._places = {
            (layer, loss): place
            for place, (layer, loss) in enumerate(
                (layer, loss) for layer, _ in self._layers for loss in LOSSES
            )
        }
        self._seen = {name: layer.last_losses for name, layer in self._layers}  # of earlier runs
        self._added: dict[tuple[int, ...], Tensor] = {}
        self.packed = torch.zeros(2 * len(self._places), dtype=torch.float64, device=device)

    def add(self) -> None:
        """Adds the losses of each layer's latest training pass, once. No wait for the device."""
        places, values = [], []
        for name, layer in self._layers:
            latest = layer.last_losses
            if latest is self._seen.get(name):
                continue  # the layer has not run since
            self._seen[name] = latest
            for loss, value in latest.items():
                places.append(self._places[name, loss])
                values.append(value)
        if not values:
            return
        key, device = tuple(places), self.packed.device
        where = self._added.get(key)
        if where is None:
            both = [*places, *(place + len(self._places) for place in places)]
            where = self._added[key] = torch.tensor(both, device=device)
        added = torch.stack(values).to(self.packed)
        self.packed.index_add_(0, where, torch.cat([added, torch.ones_like(added)]))

    def means(self, packed: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """The layers, the losses that were computed, and their means.

        Args:
            packed: :attr:`packed`, summed over ranks, on the CPU.
        """
        sums, counts = packed.chunk(2)
        for (layer, loss), place in self._places.items():
            if counts[place] > 0:
                yield layer, loss, sums[place] / counts[place]

    def reset(self) -> None:
        """Begins anew."""
        self.packed.zero_()
