"""Expert placement for ``expert_parallel_size="auto"`` while a model is being built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lightning_fastmoe.distributed.mesh import expert_parallel_sizes
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.placement import Placement, equal_blocks


class Choices(Protocol):
    """Decisions that all ranks make together."""

    def choose(self, num_experts: Mapping[str, int]) -> int:
        """The size for layers with these ``num_experts``, by name; collective."""
        ...

    def agree(self, holds: bool) -> bool:
        """Whether it holds on all ranks; collective."""
        ...

    def layers(self) -> Sequence[Any]:
        """The layers of the model as far as it is built; not a collective."""
        ...


class AutoPlacement:
    """A placement rule whose expert parallel size is known once all layers are built.

    A layer gets its slice for the largest size that divides the expert counts known so far, which
    takes the least memory. If a later layer needs a smaller size, or :meth:`settle` chooses one,
    the earlier layers get more experts: initial values depend only on the seed and on global ids,
    so the order doesn't matter. No process group is needed before the size is final.

    Args:
        rank: this process's rank in the world.
        world: number of ranks.
        ranks_per_node: ranks per node; an expert parallel group stays inside a node.
        choices: chooses the size.
        existing: ``num_experts`` of the layers that the model already has.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        ranks_per_node: int,
        choices: Choices,
        existing: Iterable[int] = (),
    ) -> None:
        self.num_experts = {f"existing {i}": n for i, n in enumerate(existing)}
        self.built = 0
        self._rank, self._world, self._ranks_per_node = rank, world, ranks_per_node
        self._choices = choices
        self._settled: int | None = None
        self._built: list[_Built] = []
        self._lost: str | None = None

    @property
    def size(self) -> int:
        """The size so far: the one settled on, or the largest that divides all layers known."""
        sizes = expert_parallel_sizes(self._world, self._ranks_per_node, self.num_experts)
        return sizes[-1] if self._settled is None else math.gcd(self._settled, sizes[-1])

    def __call__(self, num_experts: int) -> Placement | None:
        """The placement of a layer being built; None if all its experts are on this rank."""
        before = self.size
        self.num_experts[f"built {self.built}"] = num_experts
        self.built += 1
        if self.size != before:
            for layer in self._built:
                # Raised later, with the other ranks: their experts may be as they were built.
                self._lost = self._lost or layer.loss(before, self.size, num_experts)
                layer.make_again(self._place(layer.num_experts))
        return self._place(num_experts)

    def settle(self) -> int:
        """Chooses the size once all layers are built; every rank calls this.

        The size stays as it is where experts were changed on any rank, are modules, or belong to
        layers that the model doesn't have (yet), such as copies.

        Raises:
            TopologyError: on all ranks, if a layer had to be built again but was changed since.
        """
        if not self._choices.agree(self._lost is None):
            raise TopologyError(
                self._lost
                or "expert_parallel_size='auto': another rank changed the experts of a layer before"
                " a later one needed a smaller size; its error says which. Pass a number."
            )
        layers = self._choices.layers()
        self.num_experts |= {f"found {i}": layer.num_experts for i, layer in enumerate(layers)}
        size = self._choices.choose(self.num_experts)
        if size != self.size and self._choices.agree(self._may_grow(layers)):
            self._settled = size
            for layer in self._built:
                layer.make_again(self._place(layer.num_experts))
        return self.size

    def _may_grow(self, layers: Sequence[Any]) -> bool:
        built, found = ({id(one) for one in some} for some in (self._layers_built, layers))
        return (
            built <= found
            and all(one.may_grow for one in self._built)
            and all(
                id(layer) in built or layer.num_local_experts == layer.num_experts
                for layer in layers
            )
        )

    @property
    def _layers_built(self) -> list[Any]:
        return [one.layer for one in self._built]

    def _place(self, num_experts: int) -> Placement | None:
        if self.size == 1:
            return None
        blocks = equal_blocks(num_experts, self.size)
        return Placement(tuple(blocks[self._rank % self.size]), self._remember)

    def _remember(self, layer: Any, make: Callable[[tuple[int, ...] | None], nn.Module]) -> None:
        self._built.append(_Built(layer, make))


_PIECE = 2**16
"""Elements of a row that are summed at a time, as products take eight bytes each."""


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
        """What changes if experts are replaced, or written to except by ``.data``."""
        return [(id(t), t._version, t.dtype, t.device, t.requires_grad) for t in self._tensors()]

    def _find_sums(self) -> list[torch.Tensor]:
        """Sums of the experts' bits, where there are any."""
        return [_sums_of_bits(t.detach()) for t in self._tensors() if not t.is_meta]

    @property
    def is_untouched(self) -> bool:
        """Whether its experts are as they were built."""
        return self._find_state() == self._state and all(
            map(torch.equal, self._find_sums(), self._sums)
        )

    @property
    def may_grow(self) -> bool:
        """Whether more experts can be added without a trace."""
        return self.layer.experts.is_stacked and self.is_untouched

    def loss(self, before: int, size: int, num_experts: int) -> str | None:
        """What a smaller size, for a later layer, would lose: what was written to experts."""
        if self.is_untouched:
            return None
        return (
            f"expert_parallel_size='auto' chose {before} for a layer of {self.num_experts}"
            f" experts, but a later layer of {num_experts} allows only {size}, and the first"
            " layer's experts were changed since they were built, which would be lost."
            f" Pass expert_parallel_size={size}, or change weights after all layers are built."
        )

    def make_again(self, placement: Placement | None) -> None:
        """Gives the layer the experts of another placement, in its parameters where it can."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                new: Any = self.make(placement.expert_ids if placement else None)
        finally:
            torch.set_default_dtype(default)
        experts = self.layer.experts
        if not experts.is_stacked:
            self.layer.experts = new
        else:  # hooks, and what was said of a parameter, stay
            for name, parameter in experts.named_parameters():
                parameter.data = new.get_parameter(name).detach()
            experts.local_ids = new.local_ids
        self._remember()


def _sums_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """One int64 per row of the first dimension, an expert of stacked ones.

    Bits are weighted by their place, so that what has moved within a row is noticed.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    rows = tensor.contiguous().view(bits)
    if rows.dim() < 2:
        return rows.long()
    sums = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for number, piece in enumerate(rows.flatten(1).split(_PIECE, 1), 1):
        places = torch.arange(1, piece.shape[1] + 1, device=rows.device)
        sums += number * (piece * places).sum(1)
    return sums
