"""Adapters (LoRA) on the stacked experts of transformers' models, and of MoE layers beside them.

:mod:`~lightning_fastmoe.nn.experts.lora` has what is common to both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import NAME, projections
from lightning_fastmoe.huggingface.experts_view import allow_others
from lightning_fastmoe.huggingface.packed_experts import (
    dequantised,
    packed_of,
    stack_like,
    unpack,
)
from lightning_fastmoe.huggingface.peft_modules import trained_by_peft
from lightning_fastmoe.huggingface.quantizing import forget
from lightning_fastmoe.huggingface.saving_guard import guard_saving, unguard_saving
from lightning_fastmoe.huggingface.sharded_experts import TransformersLayer, kind
from lightning_fastmoe.nn.experts.lora import (
    SCALE,
    add_adapters,
    check_holder,
    check_options,
    freeze,
    merge_adapters,
    take_adapter,
)
from lightning_fastmoe.nn.lora import add_to, check_lora_layers
from lightning_fastmoe.nn.lora import merge_lora as merge_ours


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, *, also_train: Iterable[str] = ()
) -> list[str]:
    """Freezes a model and gives its experts adapters to train.

    Every rank calls it, before the Trainer's ``fit`` or at the end of ``configure_model``. A
    starts random by global id, B at zero, so that the model computes what it did before.

    Args:
        model: has experts of transformers, with ``experts_implementation="fastmoe"``, or MoE
            layers with stacked experts.
        rank: r, the rank of B A; multiples of 8 are fastest.
        alpha: B A is multiplied by ``alpha / rank``; None is ``2 * rank``.
        also_train: names of other parameters that stay trainable, or their last parts, such as
            "lm_head.weight". What a model of PEFT trains already stays trainable, too.

    Returns:
        The names of the adapters.

    Raises:
        ConfigError: if an argument is out of range, there are no such experts, they have adapters,
            PEFT's included, are quantised or use another implementation, or a name of
            ``also_train`` fits nothing.
    """
    scale = check_options(rank, alpha, also_train)
    layers = list(kind.layers(model))
    if any(name.endswith(".experts.lora_A") for name, _ in model.named_modules()):
        raise ConfigError(
            "add_lora: PEFT has put adapters of its own on the experts. For many models it takes"
            ' target_modules="all-linear", gate_proj, up_proj and down_proj to mean those of the'
            " experts: name other layers, such as q_proj."
        )
    for path, layer in layers:
        _check(path, layer)
    ours = list(check_lora_layers(model))
    if not layers and not ours:
        raise ConfigError(
            f"add_lora({type(model).__name__}): the model has no stacked experts of transformers,"
            " and no MoE layer."
        )
    freeze(model, also_train, trained_by_peft(model))
    guard_saving(model, _refuse_to_save)
    added = [
        f"{path}.experts.{name}" for path, layer in layers for name in _add_to(layer, rank, scale)
    ]
    return added + [name for path, experts in ours for name in add_to(path, experts, rank, scale)]


def _check(path: str, layer: TransformersLayer) -> None:
    experts: Any = layer.module
    chosen = experts.config._experts_implementation
    if SCALE not in vars(experts) and chosen != NAME:
        raise ConfigError(
            f"add_lora: {path}.experts uses experts_implementation={chosen!r}, which would ignore"
            f' adapters. Call model.set_experts_implementation("{NAME}") first.'
        )
    check_holder(f"{path}.experts", experts, _ordinary(experts))


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "save_pretrained of a model whose experts have adapters would write names that no loader"
        " knows. Call merge_lora(model) first, or lightning_fastmoe.huggingface.save_pretrained("
        "trainer, path), which merges them."
    )


def _ordinary(experts: Any) -> tuple[str, ...]:
    """The weights that are parameters, not packed."""
    return projections(experts) if packed_of(experts) is None else ()


def _add_to(layer: TransformersLayer, rank: int, scale: float) -> list[str]:
    """Adds the adapters of one layer; returns the names in its module."""
    experts: Any = layer.module
    names = add_adapters(
        experts,
        {name: stack_like(experts, name) for name in projections(experts)},
        rank,
        scale,
        expert_ids=layer.experts.local_ids,
        transposed=experts.is_transposed,
    )
    layer.experts.refuse_others("adapters", "merge them with merge_lora(model)")
    return names


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Adds the adapters to the weights, in fp32, and removes them.

    Weights in 4 bits become ordinary parameters: what they are computed with and the adapters.

    Args:
        model: holds all its experts, or this rank's.

    Returns:
        The number of layers that had adapters.
    """
    merged = merge_ours(model)
    for _, layer in kind.layers(model):
        experts: Any = layer.module
        if SCALE not in vars(experts):
            continue
        _merge(experts)
        allow_others(experts)
        merged += 1
    unguard_saving(model, _refuse_to_save)
    forget(model)
    return merged


def _merge(experts: Any) -> None:
    """Merges one layer's, a stack at a time: one in 4 bits is in fp32 until its adapter is in."""
    packed, options = packed_of(experts), {"transposed": experts.is_transposed}
    if packed is None:
        merge_adapters(experts, projections(experts), **options)
        return
    dtype = torch.promote_types(packed.dtype, torch.float32)
    for name in projections(experts):
        weight = take_adapter(experts, name, dequantised(experts, name, dtype), **options)
        unpack(experts, name, weight.to(packed.dtype))
    del vars(experts)[SCALE]
