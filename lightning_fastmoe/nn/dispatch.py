"""The dispatcher interface (how rows reach their experts' ranks), and the one-rank dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.router import Routing

ONE_RANK = ("auto", "local")
"""Names of dispatchers for which no other rank is needed. "auto" is "local" until experts are
sharded."""

DISPATCHERS = (*ONE_RANK, "all_to_all", "dedup", "dedup_overlapped", "symmetric")
"""Names that ``MoE(dispatcher=...)`` takes. "all_to_all" sends a row per chosen expert, "dedup" one
per rank and across nodes one per node, "symmetric" one per rank through memory that ranks share.
Those that need other ranks have a line in
``lightning_fastmoe.distributed.schedule.ACROSS_RANKS``, too."""


def check_dispatcher(name: str, exact: bool = False) -> None:
    """Raises:
    ConfigError: if ``name`` is not one of :data:`DISPATCHERS`, or can't be exact and has to be.
    """
    if name not in DISPATCHERS:
        raise ConfigError(
            f"dispatcher={name!r} is unknown. It must be one of: {', '.join(DISPATCHERS)}."
        )
    if exact:
        check_exact(name)


EXACT = (*ONE_RANK, "dedup", "symmetric")
"""Names that can have the bits of one process: those whose experts can return a row per slot."""


def check_exact(name: str, layer: str = "MoE") -> None:
    """Raises:
    ConfigError: if ``exact=True`` has no meaning for a layer with this dispatcher.
    """
    if name not in EXACT:
        raise ConfigError(
            f"{layer}: exact=True is not possible with dispatcher={name!r}, whose numbers equal"
            f" those of one process up to rounding only. Choose one of: {', '.join(EXACT)}."
        )


class Dispatcher(Protocol):
    """Moves rows to the ranks of their experts and back. Not a module: it owns no parameters.

    Used by schedules. All dispatchers are interchangeable: each gives the same numbers as
    :class:`LocalDispatcher` with all experts on one rank.
    """

    def dispatch(self, x: Tensor, routing: Routing, layer: str) -> tuple[Tensor, Tensor, Any]:
        """Sends every token to the ranks of its experts.

        Args:
            x: (T, D).
            routing: the routing of these tokens: token choice, possibly with dropped slots, or
                expert choice.
            layer: the layer's name, for errors and to detect ranks in different layers.

        Returns:
            ``x_by_expert (N, D)`` grouped by local expert, ``tokens_per_expert (e,)`` int64, and
            an opaque handle for :meth:`send` and :meth:`combine`.
        """
        ...

    def send(self, x: Tensor, handle: Any) -> Tensor:
        """Sends further rows ``x (T, W)``, of any dtype, along the route in ``handle``."""
        ...

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """Brings ``y (N, D)`` back and sums each token's rows with its weights -> (T, D)."""
        ...


@dataclass(frozen=True)
class RowPlan:
    """Which (token, slot) pairs are sent, in expert-major order, and how to combine them.

    Attributes:
        weights: (T, K); or with ``pairs`` (N,), one per row.
        order: the order of all T*K pairs, if every slot is sent.
        pairs: the rows to send, if some slots are dropped or tokens have different numbers of them.
    """

    weights: Tensor
    order: ops.ExpertOrder | None = None
    pairs: ops.PairOrder | None = None

    def gather(self, x: Tensor) -> Tensor:
        """``x (T, D) -> (N, D)`` in expert-major order."""
        if self.pairs is not None:
            return ops.gather_rows(x, self.pairs)
        assert self.order is not None
        return permute_any(x, self.order, self.weights.shape[1])

    def combine(self, y: Tensor) -> Tensor:
        """``y (N, D) -> (T, D)``, each token's weighted sum."""
        if self.pairs is not None:
            return ops.combine_rows(y, self.weights, self.pairs)
        assert self.order is not None
        return ops.unpermute(y, self.weights, self.order.order, self.order.inverse)


def permute_any(x: Tensor, order: ops.ExpertOrder, top_k: int = 1) -> Tensor:
    """:func:`~lightning_fastmoe.ops.permute` that takes integers too."""
    if x.is_floating_point():
        return ops.permute(x, order.order, order.inverse, top_k)
    return x.index_select(0, torch.div(order.order, top_k, rounding_mode="floor"))


def order_routing(routing: Routing, num_experts: int) -> ops.ExpertOrder:
    """All pairs by expert; dropped pairs come last, as if they belonged to an expert E."""
    if (mask := routing.dispatched) is None:
        return ops.order_by_expert(routing.expert_ids, num_experts)
    ids = routing.expert_ids.masked_fill(~mask, num_experts)
    return ops.order_by_expert(ids, num_experts + 1)


def plan_rows(routing: Routing, order: ops.ExpertOrder, num_tokens: int, num_rows: int) -> RowPlan:
    """The plan for the first ``num_rows`` of ``order``, from :func:`order_routing`."""
    weights, token_ids = routing.weights, routing.token_ids
    if token_ids is None and routing.dispatched is None:
        return RowPlan(weights, order=order)
    out = order.order[:num_rows]
    if token_ids is None:
        token = torch.div(out, weights.shape[1], rounding_mode="floor")
    else:
        token = token_ids.index_select(0, out)
    pairs = ops.order_pairs(token, num_tokens)
    return RowPlan(weights.reshape(-1).index_select(0, out), pairs=pairs)


class LocalDispatcher:
    """The dispatcher when all experts are on this rank: only a permutation."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Tensor, routing: Routing, layer: str) -> tuple[Tensor, Tensor, RowPlan]:
        """See :class:`Dispatcher`. Reads one number from the device if slots are dropped."""
        order = order_routing(routing, self.num_experts)
        counts = order.tokens_per_expert[: self.num_experts]
        rows = order.order.numel() if routing.dispatched is None else int(counts.sum())
        plan = plan_rows(routing, order, x.shape[0], rows)
        return plan.gather(x), counts, plan

    def send(self, x: Tensor, handle: RowPlan) -> Tensor:
        """See :class:`Dispatcher`."""
        return handle.gather(x)

    def combine(self, y: Tensor, handle: RowPlan) -> Tensor:
        """See :class:`Dispatcher`."""
        return handle.combine(y)
