"""Stacks in NF4 against the format in plain loops, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import nf4

LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
LEVELS += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
LEVELS += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
LEVELS += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
"""The values of the 4-bit numbers, appendix E of arXiv:2305.14314."""

SHAPES = [(24, 32), (10, 7), (64,), (130, 129)]


def blocks_of(weight: Tensor) -> Tensor:
    """(B, 64), padded with zeros, in fp64."""
    flat = weight.double().flatten()
    return torch.cat([flat, flat.new_zeros(-len(flat) % 64)]).view(-1, 64)


def check(found: Tensor, weight: Tensor, scales: Tensor | None = None) -> None:
    """Checks that each 64 numbers of one expert's weight are the nearest levels of their scale.

    Two levels that are equally near, up to the rounding of fp32, are both right.
    """
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    for number, (made, block) in enumerate(zip(blocks_of(found), blocks_of(weight), strict=True)):
        own = block.abs().max()
        distances = (block[:, None] / own.clamp_min(1e-300) - levels).abs()
        (first, second), nearest = (t.unbind(1) for t in distances.topk(2, largest=False))
        scale = own if scales is None else scales[number]
        wanted, other = (levels[index] * scale for index in (nearest[0], nearest[1]))
        is_other = (second - first < 1e-6) & ((made - other).abs() < (made - wanted).abs())
        wanted = torch.where(is_other, other, wanted)
        padding = block.numel() * (number + 1) - weight.numel()
        if padding > 0:
            made, wanted = made[:-padding], wanted[:-padding]
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_number_is_the_nearest_level_times_its_blocks_largest(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    stack = torch.randn(3, *shape).to(dtype)
    stack[1] = 0
    tensors = nf4.quantise(stack, "nf4")
    blocks = math.ceil(math.prod(shape) / 64)
    assert [(tuple(t.shape), t.dtype) for t in tensors] == [
        ((3, blocks * 32), torch.uint8),
        ((3, blocks), torch.int32),
    ]
    found = nf4.dequantise(tensors, shape, dtype)
    assert found.dtype == dtype
    exact = nf4.dequantise(tensors, shape, torch.float32)
    for own, expert in zip(exact, stack, strict=True):
        check(own, expert)
    assert torch.equal(found, exact.to(dtype))


def test_nested_scales_have_eight_bits_of_their_own_256() -> None:
    """The 8-bit format is bitsandbytes' own; each of its levels is 1.6 % of the largest at most.

    A scale that is smaller than that stays positive: its block would have the wrong signs.
    """
    shape = (130, 129)
    stack = (
        torch.randn(3, *shape)
        * torch.rand(3, 130, 1)
        * torch.tensor([1.0, 7.0, 0.1])[:, None, None]
    )
    stack[:, :20] *= torch.linspace(0, 1e-2, 20)[:, None]
    single, double = (nf4.quantise(stack, scheme) for scheme in ("nf4", "nf4-double"))
    assert torch.equal(single[0], double[0])
    assert [(tuple(t.shape), t.dtype) for t in double[1:]] == [
        ((3, 512), torch.uint8),
        ((3, 3), torch.int32),
    ]
    scales = single[1].view(torch.float32)
    found = nf4.dequantise(double, shape, torch.float32)
    for expert, own in enumerate(scales):
        mean = own.mean()
        spread = torch.stack([part.abs().max() for part in (own - mean).split(256)])
        limits = spread.repeat_interleave(256)[: len(own)] * 0.008
        # The scales that explain what was made: each block's largest number has level 1 or -1.
        made = blocks_of(found[expert]).abs().amax(1)
        assert ((made - own).abs() <= limits + 1e-6).all()
        assert not torch.equal(made, own)
        check(found[expert], stack[expert], made)
    assert (found * stack >= 0).all()


@pytest.mark.parametrize("scheme", list(nf4.SCHEMES))
def test_an_experts_bits_depend_on_nothing_else(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the other experts of its rank nor on how many are dequantised at a time."""
    stack = torch.randn(5, 24, 50)
    whole = nf4.quantise(stack, scheme)
    some = nf4.quantise(stack[1:3], scheme)
    assert all(torch.equal(a[1:3], b) for a, b in zip(whole, some, strict=True))
    usual = nf4.dequantise(whole, (24, 50), torch.bfloat16)
    monkeypatch.setattr(nf4, "_ELEMENTS", 2500)
    assert torch.equal(nf4.dequantise(whole, (24, 50), torch.bfloat16), usual)
    # Strided tensors are read as what they are.
    strided = [torch.stack([t, torch.zeros_like(t)], 2)[:, :, 0] for t in whole]
    assert torch.equal(nf4.dequantise(strided, (24, 50), torch.bfloat16), usual)
    turned = nf4.quantise(stack.mT.contiguous().mT, scheme)
    assert all(torch.equal(a, b) for a, b in zip(turned, whole, strict=True))


def test_numbers_without_a_scale_are_refused() -> None:
    stack = torch.randn(2, 8, 8)
    for bad in (torch.nan, torch.inf):
        stack[1, 3, 3] = bad
        with pytest.raises(ConfigError, match="NaN or Inf"):
            nf4.quantise(stack, "nf4")


def test_stacks_are_found_among_names() -> None:
    names = ["a.up_nf4", "a.up_nf4_absmax", "a.up_nf4_absmax2", "b_nf4", "b_nf4_absmax", "c_nf4"]
    found = nf4.stored_stacks(names)
    assert found == {"a.up": names[:3], "b": names[3:5]}
