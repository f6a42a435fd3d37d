"""The layers of a model whose experts can be sharded: our own, and those of other packages.

Strategies, ZeRO and checkpoints work with any layer that has the members of :class:`ExpertLayer`.
What the layers of a model are is asked of each of :data:`KINDS`; a package that computes the
experts of another one's models adds its kind there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.nn.collect import moe_layers
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.global_batch import GlobalBatch
from lightning_fastmoe.nn.nonfinite import NonFiniteGuard
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.nn.schedule import Schedule


class ExpertLayer(Protocol):
    """A mixture-of-experts layer as strategies, ZeRO and checkpoints see it.

    Its experts' parameters are named ``NAME.experts.PARAMETER`` in the model.
    :class:`~lightning_fastmoe.MoE` has these members.

    Attributes:
        num_experts: experts in the whole model, E.
        dispatcher_name: a name of :data:`~lightning_fastmoe.nn.dispatch.DISPATCHERS`.
        exact: whether its numbers must have the bits of one process.
        layer_name: the layer's name, for errors.
        schedule: runs tokens through the experts.
        nonfinite: looks for NaN and Inf in what the router gives.
    """

    num_experts: int
    dispatcher_name: str
    exact: bool
    layer_name: str
    schedule: Schedule
    nonfinite: NonFiniteGuard

    @property
    def training(self) -> bool:
        """Whether the layer is training."""
        ...

    @property
    def experts(self) -> Experts:
        """The experts on this rank."""
        ...

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank, e."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only some of the layer's experts."""
        ...

    @property
    def top_k(self) -> int | None:
        """Experts per token, K; None if the router doesn't choose a fixed number."""
        ...

    @property
    def uses_global_batch(self) -> bool:
        """Whether forward passes exchange counts over all ranks."""
        ...

    @property
    def exchanged_counts(self) -> int:
        """The largest number of counts in one such exchange."""
        ...

    def register_routing_observer(
        self, observer: Callable[[Any, Routing], None]
    ) -> RemovableHandle:
        """Calls ``observer(layer, routing)`` at each forward pass, but not when one is replayed.

        Of other layers than :class:`~lightning_fastmoe.MoE`, logits and scores may be unknown: NaN.
        """
        ...

    def connect(self, name: str, batch: GlobalBatch | None, schedule: Schedule) -> None:
        """Connects the layer to the other ranks of a run; see :meth:`MoE.connect`."""
        ...

    def disconnect(self) -> None:
        """Disconnects from the other ranks. A layer that holds only some experts then can't run."""
        ...


class LayerKind(Protocol):
    """One kind of layers."""

    def find(self, module: nn.Module) -> Iterator[tuple[str, ExpertLayer]]:
        """The layers of this kind inside ``module`` with their names, in registration order."""
        ...

    def check(self, module: nn.Module) -> None:
        """Called before the experts of ``module`` are sharded.

        Raises:
            ConfigError: if ``module`` has experts of this kind that can't be.
        """
        ...

    def guard(self, module: nn.Module) -> None:
        """Called when experts of ``module`` have been sharded: refuses what would then be wrong."""
        ...


class _Ours:
    """:class:`~lightning_fastmoe.MoE`, whose experts can always be sharded."""

    def find(self, module: nn.Module) -> Iterator[tuple[str, ExpertLayer]]:
        return moe_layers(module)

    def check(self, module: nn.Module) -> None:
        pass

    def guard(self, module: nn.Module) -> None:
        pass


KINDS: list[LayerKind] = [_Ours()]
"""The kinds of layers that :func:`expert_layers` finds."""


def expert_layers(module: nn.Module) -> Iterator[tuple[str, ExpertLayer]]:
    """The layers inside ``module`` whose experts can be sharded, of all kinds, with their names."""
    for kind in KINDS:
        yield from kind.find(module)
