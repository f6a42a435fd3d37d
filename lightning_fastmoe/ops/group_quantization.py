"""Symmetric integers with a scale per group of weights: int8, or int4 with two values per byte.

A group is 64 consecutive values of a row, that is, along the last dimension, which is contiguous.
In the layout of ``nn.Linear``, which nearly all experts have, that is also the dimension that a
product sums over. Weights are dequantized before they are multiplied, so the error of a weight
depends on its own group alone, whichever dimension groups lie along; rows keep reads and writes
contiguous. Groups with scales of their own keep one large weight from making those of a whole row
coarse (Q-BERT: Shen et al. 2020, arXiv 1909.05840; GPTQ: Frantar et al. 2023, arXiv 2210.17323).

All is elementwise in IEEE arithmetic, so the CPU and CUDA give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.ops.native import native

GROUP = 64
"""Values that share a scale. The last group of a row may have fewer."""

BITS = {"int8": 8, "int4": 4}
"""Bits of a value by the name of a format."""

SCALE_DTYPES = {
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float32,  # a group of small weights has a scale that fp16 can't represent
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The dtype of scales by that of weights, which are those that can be quantized."""

_QUANTIZED_AT_A_TIME, _CHUNK = 1 << 22, 1 << 26
"""Values that are quantized and dequantized at a time, which bounds temporary memory."""


def bits_of(name: str) -> int:
    """Bits of a format of :data:`BITS`.

    Raises:
        ConfigError: if there is no such format.
    """
    if name not in BITS:
        raise ConfigError(f"compression={name!r} is unknown: use {' or '.join(BITS)}, or None.")
    return BITS[name]


def quantized_bytes(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, bits: int) -> int:
    """Bytes of the values and scales of weights ``(..., D)``."""
    codes, scales = quantized_shapes(tuple(shape), bits)
    return codes.numel() + scales.numel() * SCALE_DTYPES[dtype].itemsize


def quantized_shapes(shape: tuple[int, ...], bits: int) -> tuple[torch.Size, torch.Size]:
    """Shapes of the values ``(..., D or ceil(D / 2))`` and scales ``(..., ceil(D / 64))``."""
    *rows, width = shape
    packed = width if bits == 8 else (width + 1) // 2
    return torch.Size((*rows, packed)), torch.Size((*rows, -(-width // GROUP)))


def group_scales(largest: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scales of groups whose largest magnitudes these are.

    Scales are rounded to nearest, so that a quotient is at most 127 (1 + 2^-8), which rounds to no
    more than 127. They are normal numbers, also of groups that are zero.

    Args:
        largest: any shape, fp32 or fp64.
        bits: 8 or 4.
        dtype: of the weights.

    Returns:
        The same shape, in the dtype of :data:`SCALE_DTYPES`.
    """
    # A tensor: a number's reciprocal would be multiplied on CUDA, which rounds otherwise.
    limit = largest.new_tensor(2 ** (bits - 1) - 1)
    stored = SCALE_DTYPES[dtype]
    return (largest / limit).to(stored).clamp_min(torch.finfo(stored).tiny)


def can_quantize(weight: Tensor, bits: int) -> bool:
    """Whether all values are finite, and so after rounding.

    Args:
        weight: any shape, of a dtype in :data:`SCALE_DTYPES`.
        bits: 8 or 4.
    """
    least, most = torch.aminmax(weight)  # NaN if any value is
    largest = torch.maximum(-least, most).to(_wide(weight.dtype))
    scale = group_scales(largest, bits, weight.dtype)
    return bool((scale * (2 ** (bits - 1) - 1)).isfinite())


def quantize_groups(
    weight: Tensor, bits: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds weights to integers of [-127, 127] or [-7, 7] times the scale of their group.

    Args:
        weight: (..., D), not empty, finite, of a dtype in :data:`SCALE_DTYPES`.
        bits: 8 or 4.
        device: computes, some rows at a time; None is that of ``weight``.

    Returns:
        On the device of ``weight``: values int8 (..., D), or (..., ceil(D / 2)) with 4 bits: of a
        group of n values, byte j has value j in its lower half and value j + ceil(n / 2) in the
        upper one. Scales (..., ceil(D / 64)). A value times its scale is within half a scale of the
        weight.
    """
    shapes = quantized_shapes(tuple(weight.shape), bits)
    codes = weight.new_empty(shapes[0], dtype=torch.int8)
    scales = weight.new_empty(shapes[1], dtype=SCALE_DTYPES[weight.dtype])
    step = max(1, _QUANTIZED_AT_A_TIME // weight.shape[-1])
    parts = (tensor.view(-1, tensor.shape[-1]).split(step) for tensor in (codes, scales))
    rows = weight.reshape(-1, weight.shape[-1]).split(step)
    for own_codes, own_scales, part in zip(*parts, rows, strict=True):
        values, steps = _quantized_rows(part.to(device), bits)
        own_codes.copy_(values)
        own_scales.copy_(steps)
    return codes, scales


def dequantize_groups(
    codes: Tensor, scales: Tensor, out: Tensor, bits: int, scratch: Tensor | None = None
) -> None:
    """Writes values times scales, rounded once to the dtype of ``scales``, then to that of ``out``.

    On CUDA one kernel, where rows are whole groups; its twin is several of torch's.

    Args:
        codes: of :func:`quantize_groups`, contiguous.
        scales: the same.
        out: (..., D), contiguous, in the dtype of the weights.
        bits: 8 or 4.
        scratch: int8 of at least :func:`scratch_bytes` elements, to allocate nothing.
    """
    width = out.shape[-1]
    aligned = width % GROUP == 0 and out.data_ptr() % 16 == codes.data_ptr() % 16 == 0
    if aligned and (library := native(codes, scales, out)) is not None:
        library.dequantize_groups_(codes, scales, out, bits)
        return
    codes, scales = codes.view(-1, codes.shape[-1]), scales.view(-1, scales.shape[-1])
    out = out.view(-1, width)
    if scratch is None:
        scratch = codes.new_empty(scratch_bytes(out.shape, bits))
    step = _rows_at_a_time(width)
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        _dequantize_rows(codes[rows], scales[rows], out[rows], bits, scratch)


def scratch_bytes(shape: torch.Size | tuple[int, ...], bits: int) -> int:
    """Bytes that :func:`dequantize_groups` needs beside its arguments for weights ``(..., D)``."""
    if bits == 8:
        return 0
    *rows, width = shape
    return min(torch.Size(rows).numel(), _rows_at_a_time(width)) * ((width + 1) // 2)


def _quantized_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows, width = weight.shape
    groups = F.pad(weight.to(_wide(weight.dtype)), (0, -width % GROUP)).view(rows, -1, GROUP)
    least, most = torch.aminmax(groups, dim=-1)
    scales = group_scales(torch.maximum(-least, most), bits, weight.dtype)
    quotients = groups / scales.to(groups.dtype).unsqueeze(-1)
    codes = quotients.round_().to(torch.int8).flatten(1)[:, :width]
    if bits == 4:
        spans = _spans(width)
        codes = torch.cat([_packed(codes[:, a:b], n) for a, b, n in spans], dim=1)
    return codes, scales


def _dequantize_rows(
    codes: Tensor, scales: Tensor, out: Tensor, bits: int, scratch: Tensor
) -> None:
    for a, b, n in _spans(out.shape[1]):
        own = out[:, a:b].unflatten(1, (-1, n))
        scale = scales[:, a // GROUP : a // GROUP + own.shape[1]].unsqueeze(-1)
        if bits == 8:
            torch.mul(codes[:, a:b].unflatten(1, (-1, n)), scale, out=own)
            continue
        half = (n + 1) // 2
        packed = codes[:, a // 2 : a // 2 + own.shape[1] * half].unflatten(1, (-1, half))
        value = scratch[: packed.numel()].view(packed.shape)
        torch.bitwise_left_shift(packed, 4, out=value)
        value.bitwise_right_shift_(4)  # with the sign
        torch.mul(value, scale, out=own[..., :half])
        torch.bitwise_right_shift(packed, 4, out=value)
        torch.mul(value[..., : n - half], scale, out=own[..., half:])


def _packed(codes: Tensor, n: int) -> Tensor:
    """``codes (R, G * n)`` of groups of n values -> (R, G * ceil(n / 2))."""
    groups = codes.unflatten(1, (-1, n))
    half = (n + 1) // 2
    upper = F.pad(groups[..., half:], (0, 2 * half - n))
    both: Tensor = (groups[..., :half] & 15) | (upper << 4)
    return both.flatten(1)


def _spans(width: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, size of a group) of the whole groups of a row, and of a smaller one's."""
    whole = width // GROUP * GROUP
    if whole:
        yield 0, whole, GROUP
    if whole < width:
        yield whole, width, width - whole


def _rows_at_a_time(width: int) -> int:
    return max(1, _CHUNK // width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
