"""Stacks of experts' weights in NF4, the 4-bit format of QLoRA (arXiv:2305.14314).

bitsandbytes quantises and dequantises: 64 consecutive weights share a scale, and each is one of 16
values times it. ``"nf4-double"`` stores the scales in 8 bits, 256 to a scale of their own: 4.13
bits per weight rather than 4.5. Each expert is quantised by itself, padded with zeros to whole
blocks, so that its bits depend on nothing but its weights and all tensors have a row per expert.

Scales are stored as the integers of the same bits: what converts a model's floating-point numbers
to bf16 would silently change the weights otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError, MissingPackageError

SCHEMES = {"nf4": ("", "_absmax"), "nf4-double": ("", "_absmax", "_absmax2")}
"""Scheme -> ends of the names of a stack's tensors, after :data:`MARK`."""
MARK = "_nf4"

_BLOCK, _SCALES_PER_BLOCK = 64, 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS = 2**30
"""Elements that are dequantised at a time: bitsandbytes counts them in 32 bits."""


def functions() -> Any:
    """``bitsandbytes.functional``.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingPackageError(
            f"Experts in 4 bits need bitsandbytes 0.48 or newer ({error}): pip install"
            " 'lightning-fastmoe[qlora]'."
        ) from error
    return bitsandbytes.functional


def check_scheme(scheme: Any) -> str:
    """Refuses what is no scheme.

    Raises:
        ConfigError: naming it.
    """
    if scheme not in SCHEMES:
        raise ConfigError(
            f"Experts can't be quantised to {scheme!r}: choose {' or '.join(map(repr, SCHEMES))}."
        )
    return str(scheme)


def tensor_names(name: str, scheme: str) -> list[str]:
    """The names of the tensors that hold the stack ``name``."""
    return [f"{name}{MARK}{end}" for end in SCHEMES[scheme]]


def packed_bytes(shape: Sequence[int]) -> int:
    """Bytes of the 4-bit numbers of one expert's weight of that shape."""
    return math.ceil(math.prod(shape) / _BLOCK) * _BLOCK // 2


@torch.no_grad()
def quantise(stack: Tensor, scheme: str, device: torch.device | None = None) -> list[Tensor]:
    """The tensors of a stack, in the order of :func:`tensor_names`.

    Args:
        stack: (e, ...), floating-point.
        scheme: a key of :data:`SCHEMES`.
        device: where one expert after the other is quantised; None is the stack's device.

    Returns:
        4-bit numbers uint8 (e, B * 32), where B is the number of an expert's blocks; scales, int32
        (e, B), or uint8 (e, B padded to a multiple of 256) and int32 (e, B / 256 + 1): the bits of
        their own scales and of their mean. On the device of the stack.

    Raises:
        ConfigError: if there are NaN or Inf.
    """
    bits, rows = functions(), []
    for expert in stack:
        flat = _flat(expert).to(device or stack.device)
        if flat.dtype not in _DTYPES:
            flat = flat.float()
        if not bool(torch.isfinite(flat).all()):
            raise ConfigError("weights with NaN or Inf can't be quantised")
        flat = _padded(flat, _BLOCK)
        numbers, state = bits.quantize_4bit(flat, blocksize=_BLOCK, quant_type="nf4")
        row = [numbers.view(-1)]
        scales = state.absmax
        if scheme == "nf4":
            row.append(scales.view(torch.int32))
        else:
            mean = scales.mean()
            small, state = bits.quantize_blockwise(
                _padded(scales - mean, _SCALES_PER_BLOCK), blocksize=_SCALES_PER_BLOCK
            )
            row += [small, torch.cat([state.absmax, mean[None]]).view(torch.int32)]
        rows.append([tensor.to(stack.device) for tensor in row])
    return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]


@torch.no_grad()
def dequantise(tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The stack of :func:`quantise`, without a host synchronisation.

    Args:
        tensors: as it returned them.
        shape: of one expert's weight.
        dtype: fp64 is made from fp32, which is exact.

    Returns:
        (e, *shape), new.
    """
    numbers, scales, *nested = tensors
    count, size = numbers.shape[0], math.prod(shape)
    length = 2 * numbers.shape[1]
    step = max(1, _ELEMENTS // length)
    if step >= count:
        made = _dequantised(numbers, scales, nested, dtype)
    else:
        made = torch.empty(count, length, dtype=dtype, device=numbers.device)
        for first in range(0, count, step):
            part = slice(first, first + step)
            some = _dequantised(numbers[part], scales[part], [n[part] for n in nested], dtype)
            made[part] = some
    return made[:, :size].reshape(count, *shape)


def _dequantised(
    numbers: Tensor, scales: Tensor, nested: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """Experts (e, B * 64), padding included."""
    bits = functions()
    count, half = numbers.shape
    absmax = _scales(bits, scales, nested[0]) if nested else scales.view(torch.float32)
    state = bits.QuantState(
        _flat(absmax[:, : 2 * half // _BLOCK]),
        shape=torch.Size((count, 2 * half)),
        dtype=dtype if dtype in _DTYPES else torch.float32,
        blocksize=_BLOCK,
        quant_type="nf4",
    )
    made: Tensor = bits.dequantize_4bit(_flat(numbers)[:, None], state)
    return made.to(dtype)


def _scales(bits: Any, small: Tensor, nested: Tensor) -> Tensor:
    """Scales (e, S) of their 8 bits (e, S), and their own scales and mean (e, S / 256 + 1)."""
    large, mean = nested.view(torch.float32).split([nested.shape[1] - 1, 1], 1)
    scales: Tensor = bits.dequantize_blockwise(
        small.contiguous(),
        absmax=_flat(large),
        code=_map_of_scales(small.device),
        blocksize=_SCALES_PER_BLOCK,
    )
    # Rounding may make a very small scale negative, which would turn its block's signs.
    return scales.view(small.shape).add_(mean).clamp_min_(0)


@functools.cache
def _map_of_scales(device: torch.device) -> Tensor:
    """What 8 bits of a scale mean, on the device, where bitsandbytes would copy it in each call."""
    code: Tensor = functions().create_dynamic_map().to(device)
    return code


def _flat(tensor: Tensor) -> Tensor:
    """In one dimension and contiguous: bitsandbytes doesn't look at strides."""
    return tensor.reshape(-1).contiguous()


def _padded(flat: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % multiple))


def stored_stacks(names: Collection[str]) -> dict[str, list[str]]:
    """The stacks among the names of tensors: name of a stack -> :func:`tensor_names`."""
    found = {}
    for scheme in SCHEMES:  # the later ones have more tensors
        for name in sorted(one.removesuffix(MARK) for one in names if one.endswith(MARK)):
            tensors = tensor_names(name, scheme)
            if all(one in names for one in tensors):
                found[name] = tensors
    return found
