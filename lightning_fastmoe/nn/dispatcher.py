"""How tokens reach their experts and come back: the interface, and the one-rank case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.nn.router.base import Routing

DISPATCHERS = ("auto", "local", "all_to_all")
"""Names that ``MoE(dispatcher=...)`` takes. "auto" is "local" until experts are spread."""


class Dispatcher(Protocol):
    """Moves tokens to experts and back. Not a module: it owns no parameters.

    All dispatchers are interchangeable; each gives the same numbers as :class:`LocalDispatcher`
    with all experts.
    """

    def dispatch(self, x: Tensor, routing: Routing, layer: str) -> tuple[Tensor, Tensor, Any]:
        """Sends every token to the ranks of its experts.

        Args:
            x: (T, D).
            routing: the choice for these tokens.
            layer: the layer's name, for errors and to detect ranks in different layers.

        Returns:
            ``x_by_expert (N, D)`` grouped by local expert, ``tokens_per_expert (e,)`` int64, and
            whatever :meth:`combine` must remember.
        """
        ...

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """Brings ``y (N, D)`` back and sums each token's rows with its weights -> (T, D)."""
        ...


@dataclass(frozen=True)
class LocalHandle:
    """What a local dispatch must remember: weights and the order by expert."""

    weights: Tensor
    order: ops.ExpertOrder


class LocalDispatcher:
    """All experts are on this rank: a permutation and nothing else."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, x: Tensor, routing: Routing, layer: str
    ) -> tuple[Tensor, Tensor, LocalHandle]:
        """See :class:`Dispatcher`."""
        order = ops.order_by_expert(routing.expert_ids, self.num_experts)
        rows = ops.permute(x, order.order, order.inverse, routing.expert_ids.shape[1])
        return rows, order.tokens_per_expert, LocalHandle(routing.weights, order)

    def combine(self, y: Tensor, handle: LocalHandle) -> Tensor:
        """See :class:`Dispatcher`."""
        return ops.unpermute(y, handle.weights, handle.order.order, handle.order.inverse)
