"""Adapters (LoRA) of the experts of :class:`~lightning_fastmoe.MoE` layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.collect import moe_layers
from lightning_fastmoe.nn.experts.lora import (
    SCALE,
    add_adapters,
    check_holder,
    check_options,
    freeze,
    merge_adapters,
)
from lightning_fastmoe.nn.experts.stacked import WEIGHTS, StackedExperts


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, *, also_train: Iterable[str] = ()
) -> list[str]:
    """Freezes a model and gives the experts of its MoE layers adapters to train.

    ``alpha / rank * B A`` is added to both weights of each expert (LoRA, arXiv:2106.09685), by two
    narrow grouped GEMMs. Adapters are parameters of the module of experts, ``NAME.experts.
    up_proj_lora_a (e, rank, D)`` and so on: sharded with the experts, saved by global id. Every
    rank calls it, before the Trainer's ``fit`` or at the end of ``configure_model``, after weights
    were loaded. A starts random by global id, B at zero: the model computes what it did before.

    Args:
        model: has MoE layers with stacked experts. Shared experts and routers get none.
        rank: r, the rank of B A; multiples of 8 are fastest.
        alpha: B A is multiplied by ``alpha / rank``; None is ``2 * rank``.
        also_train: names of other parameters that stay trainable, or their last parts, such as
            "head.weight".

    Returns:
        The names of the adapters.

    Raises:
        ConfigError: if an argument is out of range, there is no MoE layer, experts are modules or
            have adapters, or a name of ``also_train`` fits nothing.
    """
    scale = check_options(rank, alpha, also_train)
    layers = list(check_lora_layers(model))
    if not layers:
        raise ConfigError(f"add_lora({type(model).__name__}): there is no MoE layer.")
    freeze(model, also_train)
    return [name for path, experts in layers for name in add_to(path, experts, rank, scale)]


def check_lora_layers(model: nn.Module) -> Iterator[tuple[str, StackedExperts]]:
    """The experts of each MoE layer, with their names.

    Raises:
        ConfigError: naming experts that can't get adapters.
    """
    for name, layer in moe_layers(model):
        path = f"{name}.experts" if name else "experts"
        if not isinstance(layer.experts, StackedExperts):
            raise ConfigError(
                f"add_lora: {path} are modules, which can't get adapters: add them to the modules"
                " yourself, or use stacked experts (leave out expert=)."
            )
        check_holder(path, layer.experts, WEIGHTS)
        yield path, layer.experts


def add_to(path: str, experts: StackedExperts, rank: int, scale: float) -> list[str]:
    """Adds the adapters of one layer; returns their names in the model."""
    stacks = {name: experts.get_parameter(name) for name in WEIGHTS}
    added = add_adapters(experts, stacks, rank, scale, expert_ids=experts.local_ids)
    return [f"{path}.{name}" for name in added]


def merge_lora(model: nn.Module) -> int:
    """Adds the adapters of MoE layers to their weights, in fp32, and removes them.

    Args:
        model: holds all its experts, or this rank's.

    Returns:
        The number of layers that had adapters.
    """
    merged = 0
    for _, layer in moe_layers(model):
        if SCALE in vars(layer.experts):
            merge_adapters(layer.experts, WEIGHTS)
            merged += 1
    return merged
