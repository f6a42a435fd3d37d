"""The properties of a router that its layer needs to know, and checks of its output."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ShapeError
from lightning_fastmoe.nn.router import ROUTERS
from lightning_fastmoe.nn.router.interface import Router
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext


@dataclass(frozen=True)
class RouterTraits:
    """The traits documented in :class:`Router`, for any router module.

    A module that doesn't derive from :class:`Router` may declare any of them as an attribute; the
    others default to those of :class:`Router`.

    Attributes:
        router: the router they describe.
        name: the name of the router's class.
        num_experts: the number of experts of the layer, E.
    """

    router: nn.Module
    name: str
    num_experts: int
    causal: bool
    random: bool
    uses_batch: bool
    losses: frozenset[str]
    default_losses: frozenset[str]
    capacity_factors: tuple[float | None, float | None]
    capacity_over: str
    own_capacity: bool

    @classmethod
    def of(cls, router: nn.Module, num_experts: int) -> RouterTraits:
        """Reads them from the router of a layer with ``num_experts``."""
        names = [field.name for field in fields(cls)][3:]
        found = {name: getattr(router, name, getattr(Router, name)) for name in names}
        return cls(router, type(router).__name__, num_experts, **found)


def route(traits: RouterTraits, tokens: Tensor, context: RoutingContext) -> Routing:
    """Calls a router, with the context if it derives from :class:`Router`.

    Args:
        traits: the traits of the router.
        tokens: (T, D).
        context: the context of the pass.

    Raises:
        ShapeError: if a router from outside this package returns an invalid routing.
    """
    router = traits.router
    if isinstance(router, Router):
        routing: Routing = router(tokens, context)
    else:
        routing = router(tokens)
    if type(router) not in ROUTERS.values():
        _check_routing(routing, traits.name, len(tokens), traits.num_experts, context.layer)
    return routing


def _check_routing(
    routing: Any, router: str, num_tokens: int, num_experts: int, layer: str
) -> None:
    """Refuses an invalid return value of a custom router; ids are checked only on the CPU.

    Args:
        routing: what the router returned.
        router: its class's name.
        num_tokens: T.
        num_experts: E.
        layer: the layer's name.

    Raises:
        ShapeError: naming the field and what it should be.
    """
    name = f"{layer}: {router}"
    if not isinstance(routing, Routing):
        raise ShapeError(f"{name} returned a {type(routing).__name__}. It must return a Routing.")
    ids, soft = routing.expert_ids, routing.dispatch_mix is not None
    wanted: dict[str, tuple[Any, Any]] = {
        "logits": (tuple(routing.logits.shape), (num_tokens, num_experts)),
        "scores": (tuple(routing.scores.shape), (num_tokens, num_experts)),
        "weights": (tuple(routing.weights.shape), tuple(ids.shape)),
        "dtype of expert_ids": (ids.dtype, torch.int64),
        "dimensions of expert_ids": (ids.dim(), 2 if routing.token_ids is None else 1),
    }
    if routing.token_ids is not None:
        wanted["token_ids"] = (tuple(routing.token_ids.shape), tuple(ids.shape))
    elif not soft:
        wanted["rows of expert_ids"] = (ids.shape[0], num_tokens)
    for field, (found, expected) in wanted.items():
        if found != expected:
            raise ShapeError(f"{name} returned {field} = {found}; it must be {expected}.")
    for field, values, limit in (
        ("expert_ids", ids, num_experts),
        ("token_ids", routing.token_ids, num_tokens),
    ):
        if values is None or values.device.type != "cpu" or not values.numel():
            continue
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            raise ShapeError(
                f"{name} returned {field} from {low} to {high}; they must be in [0, {limit})."
            )
