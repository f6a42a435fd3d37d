"""Expert placement for ``expert_parallel_size="auto"`` while a model is being built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_fastmoe.distributed.mesh import resolve_expert_parallel_size
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.placement import Placement, equal_blocks


class AutoPlacement:
    """A placement rule whose expert parallel size shrinks until it divides every layer built.

    A layer gets its slice for the largest size that divides the expert counts known so far. If a
    later layer needs a smaller size, the earlier layers' experts are rebuilt: their initial values
    depend only on the seed and on their global ids, so the order doesn't matter. No process group
    is needed before the size is final.

    Args:
        rank: this process's rank in the world.
        world: number of ranks.
        ranks_per_node: ranks per node; an expert parallel group stays inside a node.
        existing: ``num_experts`` of the layers that the model already has.
    """

    def __init__(
        self, rank: int, world: int, ranks_per_node: int, existing: Iterable[int] = ()
    ) -> None:
        self.num_experts = {f"existing {i}": n for i, n in enumerate(existing)}
        self.built = 0
        self._rank, self._world, self._ranks_per_node = rank, world, ranks_per_node
        self._layers: list[_Built] = []

    @property
    def size(self) -> int:
        """The largest size that divides all layers known so far."""
        return resolve_expert_parallel_size(
            "auto", self._world, self._ranks_per_node, self.num_experts
        )

    def __call__(self, num_experts: int) -> Placement | None:
        """The placement of a layer being built; None if all its experts are on this rank.

        Raises:
            TopologyError: if an earlier layer must be rebuilt but was changed since.
        """
        before = self.size
        self.num_experts[f"built {self.built}"] = num_experts
        self.built += 1
        if self.size != before:
            for layer in self._layers:
                layer.make_again(self._place(layer.num_experts), before, self.size, num_experts)
        return self._place(num_experts)

    def _place(self, num_experts: int) -> Placement | None:
        if self.size == 1:
            return None
        blocks = equal_blocks(num_experts, self.size)
        return Placement(tuple(blocks[self._rank % self.size]), self._remember)

    def _remember(self, layer: Any, make: Callable[[tuple[int, ...] | None], nn.Module]) -> None:
        self._layers.append(_Built(layer, make))


@dataclass
class _Built:
    """A built layer and the function that made its experts."""

    layer: Any
    make: Callable[[tuple[int, ...] | None], nn.Module]

    def __post_init__(self) -> None:
        self.dtype, self.device = torch.get_default_dtype(), torch.get_default_device()
        self.num_experts: int = self.layer.num_experts
        self.untouched = self._state()

    def _state(self) -> list[Any]:
        """A fingerprint that changes if the experts are written to or replaced."""
        tensors = [*self.layer.experts.parameters(), *self.layer.experts.buffers()]
        return [(id(t), t._version, t.dtype, t.device, t.requires_grad) for t in tensors]

    def make_again(
        self, placement: Placement | None, before: int, size: int, num_experts: int
    ) -> None:
        if self._state() != self.untouched:
            raise TopologyError(
                f"expert_parallel_size='auto' chose {before} for a layer of {self.num_experts}"
                f" experts, but a later layer of {num_experts} allows only {size}, and the first"
                " layer's experts were changed since they were built, which would be lost."
                f" Pass expert_parallel_size={size}, or change weights after all layers are built."
            )
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                self.layer.experts = self.make(placement.expert_ids if placement else None)
        finally:
            torch.set_default_dtype(default)
        self.untouched = self._state()
