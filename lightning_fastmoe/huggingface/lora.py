"""Low-rank adapters (LoRA, arXiv:2106.09685) on the stacked experts of transformers' models.

An expert's weight W is frozen, and ``alpha / rank * B A`` added to it, by two narrow grouped GEMMs
on the expert's rows: the sum is never formed. Adapters are parameters of the module of experts with
a row for each expert, so they are sharded, saved by global id and resharded with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import (
    FLOATING,
    LORA_A,
    LORA_B,
    NAME,
    SCALE,
    projections,
)
from lightning_fastmoe.huggingface.freezing import freeze, guard_saving, unguard_saving
from lightning_fastmoe.huggingface.packed_experts import (
    dequantised,
    names_in_module,
    packed_of,
    stack_dtype,
    stack_shape,
    unpack,
)
from lightning_fastmoe.huggingface.quantizing import forget
from lightning_fastmoe.huggingface.sharded_experts import TransformersLayer, kind
from lightning_fastmoe.nn.experts.init import draw_layer_seed, init_experts_
from lightning_fastmoe.nn.experts.trained import trained_of


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, *, also_train: Iterable[str] = ()
) -> list[str]:
    """Freezes a model and gives its experts adapters to train.

    Every rank calls it, before the Trainer's ``fit`` or at the end of ``configure_model``. A
    starts random by global id, B at zero, so that the model computes what it did before.

    Args:
        model: has experts of transformers, with ``experts_implementation="fastmoe"``.
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
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank={rank!r} must be a positive integer.")
    alpha = 2 * rank if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ConfigError(f"alpha={alpha!r} must be a positive number.")
    if isinstance(also_train, str):
        raise ConfigError(f"also_train={also_train!r} must be a list of names.")
    layers = list(kind.layers(model))
    if any(name.endswith(".experts.lora_A") for name, _ in model.named_modules()):
        raise ConfigError(
            "add_lora: PEFT has put adapters of its own on the experts. For many models it takes"
            ' target_modules="all-linear", gate_proj, up_proj and down_proj to mean those of the'
            " experts: name other layers, such as q_proj."
        )
    if not layers:
        raise ConfigError(
            f"add_lora({type(model).__name__}): the model has no stacked experts of transformers."
        )
    for path, layer in layers:
        _check(path, layer)
    freeze(model, also_train, "add_lora")
    guard_saving(model, _refuse_to_save)
    return [
        f"{path}.experts.{name}"
        for path, layer in layers
        for name in _add_to(layer, rank, alpha / rank)
    ]


def _check(path: str, layer: TransformersLayer) -> None:
    experts: Any = layer.module
    if SCALE in vars(experts):
        raise ConfigError(f"add_lora: {path}.experts has adapters already.")
    if trained_of(experts) is not None:
        raise ConfigError(
            f"add_lora: SparseUpdate trains single experts of {path}.experts. Train adapters or"
            " single experts: call SparseUpdate.release(model) first."
        )
    chosen = experts.config._experts_implementation
    if chosen != NAME:
        raise ConfigError(
            f"add_lora: {path}.experts uses experts_implementation={chosen!r}, which would ignore"
            f' adapters. Call model.set_experts_implementation("{NAME}") first.'
        )
    for name in projections(experts) if packed_of(experts) is None else ():
        weight = experts.get_parameter(name)
        if weight.is_meta:
            raise ConfigError(
                f"add_lora: {path}.experts.{name} has no memory yet, so its adapter would never be"
                " initialised. Load the weights first."
            )
        if weight.dtype not in FLOATING:
            raise ConfigError(
                f"add_lora: {path}.experts.{name} is quantised ({weight.dtype}), and adapters are"
                " trained next to weights of 16 bits or more, or those of quantize_experts. Load"
                " the model dequantised."
            )


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "save_pretrained of a model whose experts have adapters would write names that no loader"
        " knows. Call merge_lora(model) first, or lightning_fastmoe.huggingface.save_pretrained("
        "trainer, path), which merges them."
    )


@torch.no_grad()
def _add_to(layer: TransformersLayer, rank: int, scale: float) -> list[str]:
    """Adds the adapters of one layer; returns the names in its module."""
    experts: Any = layer.module
    seed = draw_layer_seed()
    names = []
    vars(experts)[SCALE] = scale
    for name in projections(experts):
        held, *shape = stack_shape(experts, name)
        inputs, outputs = shape if experts.is_transposed else reversed(shape)
        like = experts.get_parameter(names_in_module(experts, name)[0])
        options: Any = {"dtype": stack_dtype(experts, name), "device": like.device}
        a = torch.empty(held, rank, inputs, **options)
        init_experts_(
            a,
            name=f"{name}{LORA_A}",
            layer_seed=seed,
            expert_ids=layer.experts.local_ids,
            fan_in=inputs,
            std=None,
        )
        b = torch.zeros(held, outputs, rank, **options)
        for part, value in ((LORA_A, a), (LORA_B, b)):
            experts.register_parameter(f"{name}{part}", nn.Parameter(value))
            names.append(f"{name}{part}")
    experts.register_forward_pre_hook(_refuse_other_implementations)
    return names


def _refuse_other_implementations(experts: Any, args: Any) -> None:
    chosen = experts.config._experts_implementation
    if chosen != NAME:
        raise ConfigError(
            f"{type(experts).__name__} has adapters, which experts_implementation={chosen!r} would"
            f' ignore. Keep "{NAME}", or merge them with merge_lora(model).'
        )


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Adds the adapters to the weights, in fp32, and removes them.

    Weights in 4 bits become ordinary parameters: what they are computed with and the adapters.

    Args:
        model: holds all its experts, or this rank's.

    Returns:
        The number of layers that had adapters.
    """
    merged_layers = 0
    for _, layer in kind.layers(model):
        experts: Any = layer.module
        if SCALE not in vars(experts):
            continue
        for name in projections(experts):
            a, b = (experts.get_parameter(f"{name}{part}") for part in (LORA_A, LORA_B))
            add = (a, b, vars(experts)[SCALE])
            if (packed := packed_of(experts)) is not None:
                dtype = torch.promote_types(packed.dtype, torch.float32)
                weight = dequantised(experts, name, dtype)
                merged = merged_weight(weight, *add, transposed=experts.is_transposed)
                unpack(experts, name, merged.to(packed.dtype))
            else:
                weight = experts.get_parameter(name)
                weight.copy_(merged_weight(weight, *add, transposed=experts.is_transposed))
            for part in (LORA_A, LORA_B):
                delattr(experts, f"{name}{part}")
        del vars(experts)[SCALE]
        hooks = experts._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if hook is _refuse_other_implementations]:
            del hooks[key]
        merged_layers += 1
    unguard_saving(model, _refuse_to_save)
    forget(model)
    return merged_layers


def merged_weight(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, *, transposed: bool
) -> Tensor:
    """``weight`` with ``scale * b @ a`` of each expert added, computed in fp32 at least.

    Args:
        weight: (E, outputs, inputs), or (E, inputs, outputs) if ``transposed``; as a and b, of a
            linear layer without E.
        a: (E, r, inputs).
        b: (E, outputs, r).
        scale: multiplies the product.
        transposed: the layout of ``weight``.

    Returns:
        Like ``weight``.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    added = scale * (b.to(dtype) @ a.to(dtype))
    return (weight.to(dtype) + (added.mT if transposed else added)).to(weight.dtype)
