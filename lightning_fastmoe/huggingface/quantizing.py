"""A base in 4 bits: experts of transformers' models whose frozen weights are quantised (QLoRA).

See :mod:`~lightning_fastmoe.huggingface.nf4` for the format, and
:class:`~lightning_fastmoe.ops.FrozenWeight` for how layers compute with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import nf4
from lightning_fastmoe.huggingface.experts_class import (
    NAME,
    parameter_names,
    projections,
    stacked_weights,
)
from lightning_fastmoe.huggingface.packed_experts import (
    PACKED,
    dequantised,
    pack,
    packed_of,
    unpack,
)
from lightning_fastmoe.huggingface.peft_modules import trained_by_peft
from lightning_fastmoe.huggingface.saving_guard import guard_saving, unguard_saving
from lightning_fastmoe.huggingface.sharded_experts import TransformersLayer, kind
from lightning_fastmoe.nn.experts.lora import FLOATING, SCALE, freeze
from lightning_fastmoe.nn.experts.trained import trained_of

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Keeps transformers from reading weights ahead, faster than they are quantised."""


def quantize_experts(model: nn.Module, scheme: str = "nf4") -> None:
    """Stores the weights of a model's experts in 4 bits, and freezes the model.

    Train adapters of it with :func:`~lightning_fastmoe.huggingface.add_lora`. A model whose weights
    don't fit is quantised while it is read:
    ``from_pretrained(path, quantize_experts="nf4")``. Each forward and backward pass makes the
    weights of one projection of one layer at a time, in the dtype of its input. Every rank calls
    it, before the Trainer's ``fit`` or in ``configure_model``. Where there is a GPU it quantises.

    Args:
        model: has experts of transformers, with ``experts_implementation="fastmoe"``.
        scheme: ``"nf4"``, 4.5 bits per weight, or ``"nf4-double"``, 4.13.

    Raises:
        ConfigError: before the model is changed, if the scheme is unknown, there are no such
            experts, they are quantised already, have adapters, no memory or use another
            implementation; and for the first layer with NaN or Inf.
        MissingPackageError: if bitsandbytes is missing.
    """
    nf4.check_scheme(scheme)
    nf4.functions()
    layers = list(kind.layers(model))
    if not layers:
        raise ConfigError(
            f"quantize_experts({type(model).__name__}): the model has no stacked experts of"
            " transformers."
        )
    for path, layer in layers:
        _check(path, layer)
    for path, layer in layers:
        for name in projections(layer.module):
            _pack(f"{path}.experts.{name}", layer.module, name, scheme)
    finish(model)


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Makes ordinary parameters of quantised experts: the values that they are computed with.

    They stay frozen. To add adapters to them as well, call
    :func:`~lightning_fastmoe.huggingface.merge_lora` instead.

    Args:
        model: holds all its experts, or this rank's.
        dtype: None is the one that they had before.

    Returns:
        The number of layers that were quantised.

    Raises:
        ConfigError: if they have adapters.
    """
    layers = [one for one in kind.layers(model) if packed_of(one[1].module) is not None]
    for path, layer in layers:
        if SCALE in vars(layer.module):
            raise ConfigError(
                f"dequantize_experts: {path}.experts has adapters. Call merge_lora(model), which"
                " adds them to the dequantised weights."
            )
    for _, layer in layers:
        experts: Any = layer.module
        packed = vars(experts)[PACKED]
        for name in list(packed.shapes):
            unpack(experts, name, dequantised(experts, name, dtype or packed.dtype))
    forget(model)
    return len(layers)


def finish(model: nn.Module) -> None:
    """Freezes a model whose experts have been packed, and refuses what would misuse them."""
    freeze(model, (), trained_by_peft(model))
    guard_saving(model, _refuse_to_save)
    for _, layer in kind.layers(model):
        layer.module.register_forward_pre_hook(_refuse_other_implementations)
        # Files are read in any order, but ranks go through parameters together.
        own = layer.module._parameters
        for name in parameter_names(layer.module):
            own[name] = own.pop(name)


def forget(model: nn.Module) -> None:
    """Undoes :func:`finish`, but for freezing, where experts are no longer packed."""
    for _, layer in kind.layers(model):
        if packed_of(layer.module) is None:
            hooks = layer.module._forward_pre_hooks
            for key in [k for k, hook in hooks.items() if hook is _refuse_other_implementations]:
                del hooks[key]
    if all(packed_of(layer.module) is None for _, layer in kind.layers(model)):
        unguard_saving(model, _refuse_to_save)


@contextmanager
def quantised_as_assigned(model: nn.Module, scheme: str) -> Iterator[None]:
    """Within it, stacks are packed when transformers assigns them to a model without memory.

    Args:
        model: on the meta device.
        scheme: a key of :data:`~lightning_fastmoe.huggingface.nf4.SCHEMES`.
    """
    layers = list(kind.layers(model))
    if not layers:
        raise ConfigError(
            f"from_pretrained(quantize_experts={scheme!r}): {type(model).__name__} has no stacked"
            " experts of transformers. Leave the option out."
        )
    for path, layer in layers:
        stacked_weights(layer.module)  # raises what this package can't compute
        vars(layer.module)["register_parameter"] = _Packing(path, layer.module, scheme)
    usual = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if usual is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = usual
        for _, layer in layers:
            vars(layer.module).pop("register_parameter", None)


class _Packing:
    """``register_parameter`` of a module of experts that packs the weights it is given."""

    def __init__(self, path: str, experts: nn.Module, scheme: str) -> None:
        self._path, self._experts, self._scheme = path, experts, scheme

    def __call__(self, name: str, parameter: nn.Parameter | None) -> None:
        experts = self._experts
        if (before := experts._parameters.get(name)) is not None and parameter is not None:
            _check_shape(f"{self._path}.experts.{name}", before.shape, parameter.shape)
        nn.Module.register_parameter(experts, name, parameter)
        if name in projections(experts) and parameter is not None and not parameter.is_meta:
            if parameter.dtype not in FLOATING:
                raise ConfigError(_already(f"{self._path}.experts.{name}", parameter.dtype))
            _pack(f"{self._path}.experts.{name}", experts, name, self._scheme)
            # Else transformers initialises the parameters that it knows, which are gone.
            experts._is_hf_initialized = True  # type: ignore[assignment]


def _check_shape(name: str, shape: torch.Size, found: torch.Size) -> None:
    """What transformers doesn't compare where it quantises other weights."""
    if found != shape:
        raise ConfigError(
            f"{name} has shape {tuple(found)} in the files, not {tuple(shape)} as the config.json"
            " says. Check the config.json."
        )


def _pack(whole_name: str, experts: nn.Module, name: str, scheme: str) -> None:
    device = torch.device("cuda") if torch.cuda.is_available() else None
    try:
        pack(experts, name, scheme, device)
    except ConfigError as error:
        raise ConfigError(f"{whole_name}: {error}. Repair the files, or don't quantise.") from error


def _check(path: str, layer: TransformersLayer) -> None:
    experts: Any = layer.module
    what = f"quantize_experts: {path}.experts"
    packed = packed_of(experts)
    if packed is not None:
        raise ConfigError(
            f"{what} is quantised already ({packed.scheme}). To change the scheme, load the model"
            " again: quantising twice would add both errors."
        )
    if SCALE in vars(experts):
        raise ConfigError(f"{what} has adapters. Call quantize_experts before add_lora.")
    if trained_of(experts) is not None:
        raise ConfigError(
            f"{what}: SparseUpdate trains single experts of it, and those in 4 bits can't be"
            " trained. Call SparseUpdate.release(model), and train adapters."
        )
    chosen = experts.config._experts_implementation
    if chosen != NAME:
        raise ConfigError(
            f"{what} uses experts_implementation={chosen!r}, which can't compute in 4 bits. Call"
            f' model.set_experts_implementation("{NAME}") first.'
        )
    for name in projections(experts):
        weight = experts.get_parameter(name)
        if weight.dtype not in FLOATING:
            raise ConfigError(_already(f"{path}.experts.{name}", weight.dtype))
        if weight.is_meta:
            raise ConfigError(
                f"{what}.{name} has no memory yet. Load the weights first, by"
                f" from_pretrained(path, quantize_experts=...)."
            )
        if hasattr(weight, "ds_id"):
            raise ConfigError(
                f"{what}.{name} is partitioned by ZeRO 3. Quantise before the Trainer's fit."
            )
    stacked_weights(experts)


def _already(name: str, dtype: torch.dtype) -> str:
    return (
        f"quantize_experts: {name} is quantised by another library ({dtype}). Load a version with"
        " weights of 16 bits or more."
    )


def _refuse_other_implementations(experts: Any, args: Any) -> None:
    chosen = experts.config._experts_implementation
    if chosen != NAME:
        raise ConfigError(
            f"{type(experts).__name__} is in 4 bits, which experts_implementation={chosen!r} can't"
            f' compute. Keep "{NAME}", or call dequantize_experts(model).'
        )


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "save_pretrained of a model whose experts are in 4 bits would write names that no loader"
        " knows. Save the adapters (lightning_fastmoe.huggingface.save_adapters), or call"
        " merge_lora(model) or dequantize_experts(model) first."
    )
