"""Weights that are made for each GEMM against weights that are kept."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from lightning_fastmoe.ops import FrozenWeight, grouped_linear

COUNTS = torch.tensor([3, 0, 5, 1])


def make(kept: Tensor) -> tuple[FrozenWeight, list[weakref.ref[torch.UntypedStorage]]]:
    """A weight with the values of ``kept``, and what it has made."""
    made: list[weakref.ref[torch.UntypedStorage]] = []

    def stored(dtype: torch.dtype) -> Tensor:
        new = kept.detach().to(dtype, copy=True)
        made.append(weakref.ref(new.untyped_storage()))
        return new

    return FrozenWeight(stored, tuple(kept.shape)), made


def test_values_and_first_and_second_gradients_are_those_of_a_kept_weight() -> None:
    kept = torch.randn(4, 7, 6, dtype=torch.float64)
    frozen, made = make(kept)
    for weight, twin in ((frozen, kept), (frozen.transpose(1, 2), kept.transpose(1, 2))):
        assert weight.shape == twin.shape
        x = torch.randn(9, twin.shape[2], dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(9, twin.shape[1], dtype=torch.float64, requires_grad=True)
        outputs = [grouped_linear(x, one, COUNTS) for one in (weight, twin)]
        assert torch.equal(*outputs)
        firsts = [torch.autograd.grad(y, x, upstream, create_graph=True)[0] for y in outputs]
        assert torch.equal(*firsts)
        seconds = [torch.autograd.grad(first.sin().sum(), upstream)[0] for first in firsts]
        assert torch.equal(*seconds)
        assert seconds[0].abs().sum() > 0
    assert len(made) == 6


def test_it_is_made_in_the_dtype_of_the_rows_and_freed_after_each_gemm() -> None:
    frozen, made = make(torch.randn(4, 8, 8))
    x = torch.randn(9, 8, dtype=torch.bfloat16, requires_grad=True)
    out = grouped_linear(x, frozen, COUNTS)
    assert out.dtype == torch.bfloat16
    assert [one() for one in made] == [None]
    out.sum().backward()
    assert [one() for one in made] == [None, None]
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
