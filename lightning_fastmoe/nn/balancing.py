"""The balancing losses of a layer: their coefficients, and how they join its backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.attached_loss import AttachedLoss, AttachedLosses, LossScale, attach
from lightning_fastmoe.nn.router import Routing, RoutingContext
from lightning_fastmoe.nn.router.losses import LOSSES, loss_values, loss_values_in_graph
from lightning_fastmoe.nn.router.traits import RouterTraits
from lightning_fastmoe.nn.runtime_ops import attach_total
from lightning_fastmoe.nn.scaled_loss import hidden_scale

_REENTRANT = (
    "ran without gradients, as re-entrant activation checkpointing does, so its terms can't be"
    " added by hand. Leave them out of the loss: they are added automatically. Or use"
    " checkpoint(..., use_reentrant=False)."
)
_COMPILED = (
    "ran inside the graph of torch.compile(..., fullgraph=True), so its terms can't be added by"
    " hand. Leave them out of the loss: they are added automatically. Or compile without"
    " fullgraph=True and trace_layers(), which MoECausalLM and the demos call if they compile."
)

_UNKNOWN = (
    "{layer}: the Trainer {how} after training_step has returned it, and doing so to the balancing"
    " losses, which join the backward pass by themselves, is left to the strategy. Use"
    " FastMoEStrategy, on one device too; or add them by hand, in training_step:"
    " loss + sum(moe_losses(self).values())."
)


class BalancingLosses:
    """The losses of one layer.

    Args:
        traits: the traits of the layer's router: its applicable and its default losses.
        given: name -> coefficient, or None for the router's default.

    Attributes:
        coefficients: name -> coefficient of each loss of
            :data:`~lightning_fastmoe.nn.router.losses.LOSSES`. May be changed between passes; each
            training pass checks them.
        latest: name -> value, of the latest training pass, before the coefficient.
        scale: the factor by which the training loop multiplies the loss.

    Raises:
        ConfigError: as :func:`check_coefficients` does.
    """

    def __init__(self, traits: RouterTraits, given: dict[str, float | None]) -> None:
        self.coefficients: dict[str, float] = {}
        for name, loss in LOSSES.items():
            usual = loss.coefficient if name in traits.default_losses else 0.0
            value = given.get(name)
            self.coefficients[name] = usual if value is None else value
        check_coefficients(self.coefficients, traits.losses, traits.name)
        self.latest: dict[str, Tensor] = {}
        self.scale = LossScale()
        self._attached = AttachedLosses()
        self._out_of_reach = ""  # why the terms of the latest pass can't be taken
        self._unknown: str | None = None  # what is wrong if nobody tells the scale

    @property
    def use_batch(self) -> bool:
        """Whether, with the current coefficients, they exchange counts with the other ranks."""
        return any(LOSSES[name].uses_batch and c > 0 for name, c in self.coefficients.items())

    def attach(
        self,
        y: Any,
        routing: Routing,
        context: RoutingContext,
        traits: RouterTraits,
        router: nn.Module,
        *,
        replay: bool,
    ) -> Any:
        """Returns ``y``; its backward pass also starts the losses' backward pass.

        Args:
            y: the layer's output, a tensor or a structure of tensors.
            routing: the routing of this pass.
            context: the router's context.
            traits: the traits of the router.
            router: the router.
            replay: activation checkpointing is repeating the pass.

        Raises:
            ConfigError: as :func:`check_coefficients` does.
        """
        # They may have been changed.
        check_coefficients(self.coefficients, traits.losses, traits.name)
        active = {name: c for name, c in self.coefficients.items() if c > 0}
        values, total = loss_values(active, routing, context)
        if not replay:
            self.latest = {name: value.detach() for name, value in values.items()}
            without_graph = values and not torch.is_grad_enabled()
            self._out_of_reach = _REENTRANT if without_graph else ""
            how = hidden_scale() if values else None
            self._unknown = None if how is None else _UNKNOWN.format(layer=context.layer, how=how)
        if not any(value.requires_grad for value in values.values()):
            return y
        attached = AttachedLoss(values, active, total, self.scale, router, self._unknown)
        if not replay:
            self._attached.append(attached)
        if isinstance(y, Tensor):
            return attach(y, attached)
        leaves, spec = pytree.tree_flatten(y)
        leaves[0] = attach(leaves[0], attached)
        return pytree.tree_unflatten(leaves, spec)

    def attach_in_graph(
        self, y: Tensor, routing: Routing, context: RoutingContext, losses: frozenset[str]
    ) -> Tensor:
        """:meth:`attach` as a compiler traces it; the terms can't be taken then.

        A replay by activation checkpointing sets :attr:`latest` again, to what that pass found.

        Args:
            y: the layer's output (T, D).
            routing: the routing of this pass.
            context: the router's context.
            losses: the losses that apply to the router.
        """
        check_coefficients(self.coefficients, losses, "its router")
        active = {name: c for name, c in self.coefficients.items() if c > 0}
        values, total = loss_values_in_graph(active, routing, context)
        self.latest = {name: value.detach() for name, value in values.items()}
        self._out_of_reach = _COMPILED if values else ""
        # Also without gradients: the backward pass of a re-entrant checkpoint sets the factor
        # before it replays this pass.
        self.scale.in_graphs = True
        terms = [active[name] * value for name, value in values.items()]
        if not any(term.requires_grad for term in terms):
            return y
        if total is None:
            total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        return attach_total(y, total, self.scale.factor)

    def take(self, layer: str) -> list[dict[str, Tensor]]:
        """Takes the terms (coefficient times loss) of the passes since the last call.

        They are no longer added automatically.

        Raises:
            ConfigError: if the latest pass made terms that can't be added by hand: without graphs,
                or inside a compiled graph.
        """
        if self._out_of_reach:
            raise ConfigError(
                f"moe_losses: the last training pass of layer {layer!r} {self._out_of_reach}"
            )
        return [attached.terms for attached in self._attached.take()]


def check_coefficients(coefficients: dict[str, float], losses: frozenset[str], router: str) -> None:
    """Refuses coefficients that are invalid for a layer with this router.

    Args:
        coefficients: name -> coefficient.
        losses: the losses that apply to the router.
        router: its name, for errors.

    Raises:
        ConfigError: if a coefficient is negative or not finite, or a loss is unknown or does not
            apply to the router.
    """
    for name, value in coefficients.items():
        if name not in LOSSES:
            raise ConfigError(
                f"{name} is not a loss of a MoE layer. The losses are: {', '.join(LOSSES)}."
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Not by isfinite(), which torch.compile can't apply to a number that has changed.
        if not (number and 0 <= value < math.inf):
            raise ConfigError(
                f"{name}={value!r} is invalid: a loss coefficient must be finite and at least 0"
                " (0 switches the loss off)."
            )
        if value > 0 and name not in losses:
            raise ConfigError(
                f"{name}={value!r}, but this loss does not apply to {router}."
                f" Its losses are: {', '.join(sorted(losses)) or 'none'}."
            )
