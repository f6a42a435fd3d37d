"""The losses of one forward pass, tied to the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from lightning_fastmoe.nn.attached_loss import AttachedLoss, attach
from lightning_fastmoe.nn.moe_options import loss_coefficients
from lightning_fastmoe.nn.router import Routing, RoutingContext, loss_value

if TYPE_CHECKING:
    from lightning_fastmoe.nn.moe import MoE


def attach_losses(
    layer: MoE, y: Any, routing: Routing, context: RoutingContext, *, replay: bool
) -> Any:
    """Returns ``y``, whose backward pass starts that of the layer's losses too.

    Args:
        layer: whose coefficients count; its ``last_losses`` are set.
        y: the layer's output, a tensor or a structure of tensors.
        routing: of this pass.
        context: what the router was told.
        replay: activation checkpointing is repeating the pass.

    Raises:
        ConfigError: for a coefficient that is negative, or of a loss that the router hasn't.
    """
    # They may have been set since the layer was built.
    coefficients = loss_coefficients(layer.router, **layer.loss_coefficients)
    active = {name: c for name, c in coefficients.items() if c > 0}
    values = {name: loss_value(name, routing, context) for name in active}
    if not replay:
        layer.last_losses = {name: value.detach() for name, value in values.items()}
        layer._losses_without_graph = bool(values) and not torch.is_grad_enabled()
    terms = {name: active[name] * value for name, value in values.items()}
    if not any(term.requires_grad for term in terms.values()):
        return y
    attached = AttachedLoss(terms, layer.loss_scale)
    if not replay:
        layer._attached.append(attached)
    leaves, spec = pytree.tree_flatten(y)
    leaves[0] = attach(leaves[0], attached)
    return pytree.tree_unflatten(leaves, spec)
