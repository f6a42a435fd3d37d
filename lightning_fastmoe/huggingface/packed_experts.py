"""Modules of experts whose weights are in 4 bits: what they hold, and the weights made of it.

In place of the parameter of a stack, ``gate_up_proj`` for example, the module has frozen parameters
of integers with a row for each expert, ``gate_up_proj_nf4`` and its scales. They are sharded, saved
by global id and resharded as any other, and ZeRO divides them at most, as they are never trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError, UnmanagedExpertsError
from lightning_fastmoe.huggingface import nf4
from lightning_fastmoe.ops import FrozenWeight

PACKED = "fastmoe_packed"
"""The attribute of experts whose weights are stored in 4 bits."""


@dataclass(frozen=True)
class Packed:
    """What the parameters of a module with packed weights don't say.

    Attributes:
        scheme: a key of :data:`~lightning_fastmoe.huggingface.nf4.SCHEMES`.
        shapes: name of each stack -> the shape of one expert's weight.
        dtype: the dtype that the weights had, and that new adapters get.
    """

    scheme: str
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype


class PackedParameter(nn.Parameter):
    """Integers, which can't be trained.

    Args:
        data: the integers.
        requires_grad: False.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> PackedParameter:
        made: PackedParameter = super().__new__(cls, data, requires_grad)
        return made

    def requires_grad_(self, requires_grad: bool = True) -> PackedParameter:
        """Refuses to be trained.

        Raises:
            ConfigError: saying what can be.
        """
        if requires_grad:
            raise ConfigError(
                "requires_grad_(True): experts in 4 bits can't be trained themselves. Train"
                " adapters with add_lora(model, rank), other parameters by their names, or load"
                " the model without quantize_experts."
            )
        return super().requires_grad_(False)  # type: ignore[return-value]


def packed_of(experts: Any) -> Packed | None:
    """What is known of packed weights; None if the module's are ordinary parameters."""
    found: Packed | None = vars(experts).get(PACKED)
    return found


def pack(experts: nn.Module, name: str, scheme: str, device: torch.device | None = None) -> None:
    """Puts the packed form of a stack in the place of its parameter.

    Args:
        experts: the module.
        name: of the parameter (e, ...).
        scheme: a key of :data:`~lightning_fastmoe.huggingface.nf4.SCHEMES`.
        device: where it is quantised; None is the parameter's device.

    Raises:
        ConfigError: if it has NaN or Inf; the module is then as before.
    """
    stack = experts.get_parameter(name)
    tensors = nf4.quantise(stack.detach(), scheme, device)
    before = packed_of(experts)
    shapes = {**(before.shapes if before else {}), name: tuple(stack.shape[1:])}
    delattr(experts, name)
    for own, tensor in zip(nf4.tensor_names(name, scheme), tensors, strict=True):
        experts.register_parameter(own, PackedParameter(tensor))
    vars(experts)[PACKED] = Packed(scheme, shapes, stack.dtype)


def unpack(experts: nn.Module, name: str, weight: Tensor) -> None:
    """Makes an ordinary parameter of a stack again: ``weight (e, ...)``."""
    packed = vars(experts)[PACKED]
    for own in nf4.tensor_names(name, packed.scheme):
        delattr(experts, own)
    experts.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    shapes = {n: shape for n, shape in packed.shapes.items() if n != name}
    if shapes:
        vars(experts)[PACKED] = Packed(packed.scheme, shapes, packed.dtype)
    else:
        del vars(experts)[PACKED]


def names_in_module(experts: Any, name: str) -> list[str]:
    """The names of the parameters that hold the stack ``name``."""
    packed = packed_of(experts)
    if packed is None or name not in packed.shapes:
        return [name]
    return nf4.tensor_names(name, packed.scheme)


def stack_shape(experts: Any, name: str) -> tuple[int, ...]:
    """(e, ...) of a stack, packed or not, also where ZeRO 3 has partitioned it."""
    packed = packed_of(experts)
    first = experts.get_parameter(names_in_module(experts, name)[0])
    shape = tuple(getattr(first, "ds_shape", first.shape))
    return (
        shape if packed is None or name not in packed.shapes else (shape[0], *packed.shapes[name])
    )


def stack_like(experts: Any, name: str) -> Tensor:
    """A tensor without memory of its own that has the shape, dtype and device of a stack."""
    first = experts.get_parameter(names_in_module(experts, name)[0])
    element = torch.empty((), dtype=stack_dtype(experts, name), device=first.device)
    return element.expand(stack_shape(experts, name))


def stack_dtype(experts: Any, name: str) -> torch.dtype:
    """The dtype of a stack, or the one that it had before it was packed."""
    packed = packed_of(experts)
    if packed is not None and name in packed.shapes:
        return packed.dtype
    dtype: torch.dtype = experts.get_parameter(name).dtype
    return dtype


def weight_of(experts: Any, name: str) -> Tensor | FrozenWeight:
    """A stack as it is computed with: the parameter, or how to make the packed one's weights."""
    packed = packed_of(experts)
    if packed is None or name not in packed.shapes:
        weight: Tensor = getattr(experts, name)
        return weight

    def make(dtype: torch.dtype) -> Tensor:
        return dequantised(experts, name, dtype)

    return FrozenWeight(make, stack_shape(experts, name))


def dequantised(experts: Any, name: str, dtype: torch.dtype) -> Tensor:
    """The weights (e, ...) of a packed stack.

    Raises:
        UnmanagedExpertsError: if ZeRO 3 has not gathered them.
    """
    packed: Packed = vars(experts)[PACKED]
    tensors = [getattr(experts, own).detach() for own in nf4.tensor_names(name, packed.scheme)]
    shape = packed.shapes[name]
    if tensors[0].dim() != 2 or tensors[0].shape[1] != nf4.packed_bytes(shape):
        raise UnmanagedExpertsError(
            f"{name} of {type(experts).__name__} is not gathered: ZeRO 3 has it partitioned"
            f" ({tuple(tensors[0].shape)}). Compute with it inside of the Trainer's model alone."
        )
    return nf4.dequantise(tensors, shape, dtype)
