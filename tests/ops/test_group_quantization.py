"""Integers with a scale per group, against a loop over groups in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.ops import group_quantization, reference
from lightning_fastmoe.ops.group_quantization import (
    GROUP,
    SCALE_DTYPES,
    bits_of,
    can_quantize,
    dequantize_groups,
    quantize_groups,
    quantized_bytes,
    scratch_bytes,
)

WIDTHS = [1, 2, 63, 64, 65, 127, 128, 200]
DTYPES = list(SCALE_DTYPES)


def weights(width: int, dtype: torch.dtype) -> Tensor:
    """Three experts of five rows: of all magnitudes, with zeros and outliers."""
    generator = torch.Generator().manual_seed(width)
    made = torch.randn(3, 5, width, generator=generator, dtype=torch.float64)
    made *= torch.tensor([1e-4, 0.02, 1.0, 300.0, 0.0]).double()[:, None]
    made[:, :, ::7] = 0
    made[1, 1, width // 2] = 4.0
    return made.to(dtype)


def round_trip(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and weights, into memory that was NaN."""
    codes, scales = quantize_groups(weight, bits)
    out = torch.full_like(weight, torch.nan)
    dequantize_groups(codes, scales, out, bits)
    return codes, scales, out


def integers(codes: Tensor, width: int, bits: int) -> Tensor:
    """Values (R, D), unpacked byte by byte."""
    if bits == 8:
        return codes.flatten(0, -2).double()
    rows = []
    for row in codes.flatten(0, -2).tolist():
        values: list[float] = []
        while len(values) < width:
            n = min(GROUP, width - len(values))
            half = (n + 1) // 2
            packed, row = [byte & 255 for byte in row[:half]], row[half:]
            four = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
            values += [value - 16 if value > 7 else value for value in four[:n]]
        assert not row
        rows.append(values)
    return torch.tensor(rows).double()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_against_the_loop(width: int, dtype: torch.dtype, bits: int) -> None:
    weight = weights(width, dtype)
    codes, scales, out = round_trip(weight, bits)
    right, steps = reference.quantize_groups(weight, bits, GROUP, SCALE_DTYPES[dtype])
    assert scales.dtype == SCALE_DTYPES[dtype]
    repeated = scales.repeat_interleave(GROUP, -1)[..., :width]
    assert torch.equal(repeated.double(), steps)
    found = integers(codes, width, bits).view(weight.shape)
    assert found.abs().max() == 2 ** (bits - 1) - 1
    error = (found * steps - weight.double()).abs()
    assert (error <= steps * (0.5 + 1e-6)).all()
    for group, step in zip(weight.double().split(GROUP, -1), steps.split(GROUP, -1), strict=True):
        largest = group.abs().amax(-1) / (2 ** (bits - 1) - 1)
        assert (step[..., 0] <= largest * (1 + 2**-8) + 1e-37).all()
    if dtype in (torch.bfloat16, torch.float64):  # quotients have no ties that fp64 hasn't
        assert torch.equal(found, right)
        assert torch.equal(out, (found * steps).to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(out, (found.to(wide) * steps.to(wide)).to(dtype))
    assert (out[weight == 0] == 0).all()
    assert codes.nbytes + scales.nbytes == quantized_bytes(weight.shape, dtype, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_rounded_stays(dtype: torch.dtype, bits: int) -> None:
    """So offloading a model again changes nothing more."""
    _, _, once = round_trip(weights(200, dtype), bits)
    _, _, twice = round_trip(once, bits)
    wide = once.double()
    assert ((twice.double() - wide).abs() <= wide.abs() * 2 * torch.finfo(dtype).eps).all()
    if dtype == torch.bfloat16:
        assert torch.equal(once, twice)


@pytest.mark.parametrize("bits", [8, 4])
def test_chunks_of_rows(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last is smaller, with memory that was given."""
    weight = weights(200, torch.float32)
    codes, scales, right = round_trip(weight, bits)
    monkeypatch.setattr(group_quantization, "_CHUNK", 4 * 200 + 3)
    monkeypatch.setattr(group_quantization, "_QUANTIZED_AT_A_TIME", 2 * 200)
    for again, before in zip(quantize_groups(weight, bits), (codes, scales), strict=True):
        assert torch.equal(again, before)
    needed = scratch_bytes(weight.shape, bits)
    assert needed == (0 if bits == 8 else 4 * 100)
    out = torch.full_like(weight, torch.nan)
    dequantize_groups(codes, scales, out, bits, torch.empty(needed, dtype=torch.int8))
    assert torch.equal(out, right)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_and_largest_weights(dtype: torch.dtype, bits: int) -> None:
    info = torch.finfo(dtype)
    step = torch.finfo(SCALE_DTYPES[dtype]).tiny
    small = torch.tensor([[info.smallest_normal, -info.smallest_normal * info.eps, 0.0]])
    small = small.to(dtype)
    _, scales, out = round_trip(small, bits)
    assert (scales >= step).all()
    assert (out.double() - small.double()).abs().max() <= scales.double().max() / 2 + (
        info.smallest_normal * info.eps
    )
    large = torch.tensor([[info.max / 2, -info.max / 2, 1.0]], dtype=torch.float64).to(dtype)
    assert can_quantize(large, bits)
    assert round_trip(large, bits)[2].isfinite().all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not can_quantize(torch.tensor([1.0, bad, 2.0], dtype=dtype), bits)
    top = torch.tensor([[info.max]], dtype=dtype)
    assert can_quantize(top, bits) == bool(round_trip(top, bits)[2].isfinite())


def test_formats_have_names() -> None:
    assert (bits_of("int8"), bits_of("int4")) == (8, 4)
    with pytest.raises(
        ConfigError, match="compression='fp8' is unknown: use int8 or int4, or None"
    ):
        bits_of("fp8")
