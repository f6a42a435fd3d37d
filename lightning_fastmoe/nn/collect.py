"""Finds the MoE layers inside a model, and collects their losses for adding by hand."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_fastmoe.nn.moe import MoE
from lightning_fastmoe.nn.options import warn_if_not_causal


def moe_layers(module: nn.Module) -> Iterator[tuple[str, MoE]]:
    """The MoE layers inside ``module``, with their names, in registration order.

    A layer inside a module wrapped by ``torch.compile`` has the same name as without it.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, MoE):
            yield name.replace("_orig_mod.", "").removesuffix("_orig_mod").rstrip("."), layer


def moe_losses(module: nn.Module) -> dict[str, Tensor]:
    """The balancing terms of the latest forward passes, for adding them to the loss by hand.

    Terms that this returns are no longer added automatically, so nothing is counted twice::

        loss = cross_entropy + sum(moe_losses(self).values())

    Args:
        module: any module that contains MoE layers.

    Returns:
        ``{"load_balancing": ..., "z_loss": ...}``: coefficient times term, summed over all layers
        and all forward passes since the last call whose graphs are alive. Empty if there is none.

    Raises:
        ConfigError: after a forward pass inside a re-entrant activation checkpoint, whose terms
            have no graph.
    """
    totals: dict[str, Tensor] = {}
    for name, layer in moe_layers(module):
        for terms in layer.balancing.take(name):
            for key, term in terms.items():
                totals[key] = totals[key] + term if key in totals else term
    return totals


def warn_about_causality(module: nn.Module) -> None:
    """Warns of each layer inside an autoregressive module whose router sees later tokens.

    A module declares itself autoregressive by an attribute ``autoregressive = True``, its own or
    its class's; it applies to all of its submodules.
    """
    warned: set[int] = set()
    for owner in module.modules():
        if getattr(owner, "autoregressive", None) is True:
            for name, layer in moe_layers(owner):
                if id(layer) not in warned:
                    warned.add(id(layer))
                    warn_if_not_causal(layer.router_traits, name or layer.layer_name)
