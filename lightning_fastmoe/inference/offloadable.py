"""Finds the layers of a model whose experts can be offloaded."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.layer import OffloadedLayer
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.moe import MoE

OFFLOADED: WeakSet[nn.Module] = WeakSet()
"""The modules whose parameters are offloaded."""


def offloadable_layers(model: nn.Module) -> list[OffloadedLayer]:
    """The layers whose experts are to be kept in host memory, in the order of the model.

    Raises:
        ConfigError: if there are none, or they are somewhere else than on the CPU, sharded, used by
            several layers, or offloaded already.
    """
    layers: list[OffloadedLayer] = []
    seen: set[int] = set()
    for name, layer in expert_layers(model):
        if layer.is_sharded:
            raise ConfigError(f"{name} holds only some of its experts: offload the whole model.")
        holder = layer.experts.holder
        if holder in OFFLOADED:
            raise ConfigError(
                f"The experts of {name} are offloaded already: close what offload_experts returned."
            )
        parameters = list(holder.parameters())
        for parameter in parameters:
            if parameter.device.type != "cpu":
                raise ConfigError(
                    f"The experts of {name} are on {parameter.device}, and not on the CPU, where"
                    " they are to stay: build or load the model there."
                )
            if not parameter.is_contiguous():
                raise ConfigError(f"The experts of {name} are not contiguous.")
            if id(parameter) in seen:
                raise ConfigError(f"The experts of {name} are those of another layer, too.")
            seen.add(id(parameter))
        stacked = _stacks(layer.experts, parameters)
        reads_all = isinstance(layer, MoE) and layer.top_k is None
        layers.append(OffloadedLayer(holder, parameters, stacked, reads_all, name, layer))
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no experts to offload: neither layers of this package, nor"
            ' stacked experts of transformers with experts_implementation="fastmoe".'
        )
    return layers


def offloadable_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each of :func:`offloadable_layers`.

    Raises:
        ConfigError: as that does.
    """
    return [list(layer.parameters) for layer in offloadable_layers(model)]


def _stacks(experts: Experts, parameters: Sequence[nn.Parameter]) -> Experts | None:
    """The experts, if each of the parameters is one of their stacks."""
    stacks = {id(getattr(experts.holder, name, None)) for name in experts.stack_names}
    if {id(parameter) for parameter in parameters} != stacks:
        return None
    whole = all(parameter.shape[:1] == (experts.num_experts,) for parameter in parameters)
    return experts if whole else None
