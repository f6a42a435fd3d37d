"""Expert placement for ``expert_parallel_size="auto"`` while a model is being built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_fastmoe.distributed.mesh import expert_parallel_sizes
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.placement import Placement, equal_blocks


class AutoPlacement:
    """A placement rule whose expert parallel size is known once all layers are built.

    A layer gets its slice for the largest size that divides the expert counts known so far, which
    takes the least memory. If a later layer needs a smaller size, or :meth:`settle` chooses one,
    the earlier layers' experts are rebuilt: their initial values depend only on the seed and on
    their global ids, so the order doesn't matter. No process group is needed before the size is
    final.

    Args:
        rank: this process's rank in the world.
        world: number of ranks.
        ranks_per_node: ranks per node; an expert parallel group stays inside a node.
        choose: the size for layers with these ``num_experts``, by name: one of
            :func:`~lightning_fastmoe.distributed.mesh.expert_parallel_sizes`.
        layers: returns the layers of the model as far as it is built.
        existing: ``num_experts`` of the layers that the model already has.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        ranks_per_node: int,
        choose: Callable[[Mapping[str, int]], int],
        layers: Callable[[], Iterable[Any]],
        existing: Iterable[int] = (),
    ) -> None:
        self.num_experts = {f"existing {i}": n for i, n in enumerate(existing)}
        self.built = 0
        self._rank, self._world, self._ranks_per_node = rank, world, ranks_per_node
        self._choose, self._layers = choose, layers
        self._settled: int | None = None
        self._built: list[_Built] = []

    @property
    def size(self) -> int:
        """The size so far: the one settled on, or the largest that divides all layers known."""
        sizes = expert_parallel_sizes(self._world, self._ranks_per_node, self.num_experts)
        return sizes[-1] if self._settled is None else math.gcd(self._settled, sizes[-1])

    def __call__(self, num_experts: int) -> Placement | None:
        """The placement of a layer being built; None if all its experts are on this rank.

        Raises:
            TopologyError: if an earlier layer must be rebuilt but was changed since.
        """
        before = self.size
        self.num_experts[f"built {self.built}"] = num_experts
        self.built += 1
        if self.size != before:
            for layer in self._built:
                layer.check_untouched(before, self.size, num_experts)
                layer.make_again(self._place(layer.num_experts))
        return self._place(num_experts)

    def settle(self) -> int:
        """Chooses the size once all layers are built; every rank calls this.

        Where that would lose what was written to experts, or leave a copy of a layer as it was, the
        size stays as it is.
        """
        size = self._choose(self.num_experts)
        if size != self.size and self._may_build_again():
            self._settled = size
            for layer in self._built:
                layer.make_again(self._place(layer.num_experts))
        return self.size

    def _may_build_again(self) -> bool:
        known = {id(built.layer) for built in self._built}
        return all(built.is_untouched for built in self._built) and all(
            id(layer) in known or layer.num_local_experts == layer.num_experts
            for layer in self._layers()
        )

    def _place(self, num_experts: int) -> Placement | None:
        if self.size == 1:
            return None
        blocks = equal_blocks(num_experts, self.size)
        return Placement(tuple(blocks[self._rank % self.size]), self._remember)

    def _remember(self, layer: Any, make: Callable[[tuple[int, ...] | None], nn.Module]) -> None:
        self._built.append(_Built(layer, make))


@dataclass
class _Built:
    """A built layer and the function that made its experts."""

    layer: Any
    make: Callable[[tuple[int, ...] | None], nn.Module]

    def __post_init__(self) -> None:
        self.dtype, self.device = torch.get_default_dtype(), torch.get_default_device()
        self.num_experts: int = self.layer.num_experts
        self._remember()

    def _remember(self) -> None:
        self._state, self._sums = self._find_state(), self._find_sums()

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.layer.experts.parameters(), *self.layer.experts.buffers()]

    def _find_state(self) -> list[Any]:
        """What changes if experts are replaced, marked, hooked, or written to except by .data."""
        experts: nn.Module = self.layer.experts
        hooks = [
            len(hooks)
            for module in experts.modules()
            for name, hooks in vars(module).items()
            if name.endswith("_hooks")
        ]
        return [hooks] + [
            (id(t), t._version, t.dtype, t.device, t.requires_grad, sorted(vars(t)))
            for t in self._tensors()
        ]

    def _find_sums(self) -> list[torch.Tensor]:
        """Sums of the experts' bits, where there are any."""
        return [_sums_of_bits(t.detach()) for t in self._tensors() if not t.is_meta]

    @property
    def is_untouched(self) -> bool:
        """Whether its experts are as they were built."""
        return self._find_state() == self._state and all(
            map(torch.equal, self._find_sums(), self._sums)
        )

    def check_untouched(self, before: int, size: int, num_experts: int) -> None:
        """Raises if a smaller size, for a later layer, would lose what was written to experts."""
        if not self.is_untouched:
            raise TopologyError(
                f"expert_parallel_size='auto' chose {before} for a layer of {self.num_experts}"
                f" experts, but a later layer of {num_experts} allows only {size}, and the first"
                " layer's experts were changed since they were built, which would be lost."
                f" Pass expert_parallel_size={size}, or change weights after all layers are built."
            )

    def make_again(self, placement: Placement | None) -> None:
        """Builds the layer's experts anew."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                self.layer.experts = self.make(placement.expert_ids if placement else None)
        finally:
            torch.set_default_dtype(default)
        self._remember()


def _sums_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """One int64 per row of the first dimension, an expert of stacked ones."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    rows = tensor.contiguous().view(bits)
    return rows.flatten(1).sum(1, dtype=torch.int64) if rows.dim() > 1 else rows.long()
