"""Experts in the memory of a host, mapped twice in one process."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.shared import SharedExperts

SHAPES = ((3, 5, 7), (3, 7, 5), (3, 5))


def layers(count: int = 2, seed: int = 0) -> tuple[list[list[nn.Parameter]], list[Any]]:
    """Parameters of each layer, and what tells whether their memory has been freed."""
    generator, alive = np.random.default_rng(seed), []
    found = []
    for _ in range(count):
        arrays = [generator.standard_normal(shape, dtype=np.float32) for shape in SHAPES]
        alive += [weakref.ref(array) for array in arrays]
        found.append([nn.Parameter(torch.from_numpy(array)) for array in arrays])
    return found, alive


def values(found: list[list[nn.Parameter]]) -> list[torch.Tensor]:
    """Copies."""
    return [p.detach().clone() for layer in found for p in layer]


def equal(found: list[list[nn.Parameter]], right: list[torch.Tensor]) -> bool:
    """Whether all have these bits."""
    return all(torch.equal(a, b) for a, b in zip(values(found), right, strict=True))


def test_one_memory_for_two() -> None:
    first, alive = layers()
    second, others = layers(seed=1)
    right = values(first)
    one = SharedExperts(first, 6)
    two = SharedExperts(second, 6, one.shared)
    gc.collect()
    assert not any(array() is not None for array in alive + others)  # no second copy
    assert equal(first, right)
    assert equal(second, right)
    assert all(region.numel() % 6 == 0 for region in one.regions)
    with torch.no_grad():
        first[0][0].add_(1)
    assert equal(second, values(first))
    changed = values(first)

    one.part()
    two.part()
    with torch.no_grad():
        second[1][2].zero_()
    assert equal(first, changed)
    assert not two.resume(second, changed=False)  # what it wrote would be lost
    assert one.resume(first, changed=False)
    assert two.resume(second, changed=True)
    assert one.holds(first)
    assert two.holds(second)
    assert equal(second, changed)


def test_what_is_no_longer_there_is_noticed() -> None:
    first, _ = layers()
    one = SharedExperts(first, 1)
    other = first[0][0]
    other.data = other.data.clone()
    assert not one.holds(first)
    one.part()  # leaves it alone
    with torch.no_grad():
        other.add_(1)
    assert not one.resume(first, changed=False)
    assert not one.resume(layers()[0], changed=True)
    other.data = other.data.double()
    assert not one.resume(first, changed=True)


def test_other_experts_are_refused() -> None:
    one = SharedExperts(layers()[0], 1)
    with pytest.raises(ConfigError, match="Here they are of 3 layers, there of 2"):
        SharedExperts(layers(3)[0], 1, one.shared)
    wide, _ = layers()
    wide[1] = [nn.Parameter(p.double()) for p in wide[1]]
    with pytest.raises(ConfigError, match=r"float64.* in layer 1, there"):
        SharedExperts(wide, 1, one.shared)
    shared = one.shared
    del one
    gc.collect()
    with pytest.raises(ConfigError, match=r"can't be mapped|is another process's"):
        SharedExperts(layers()[0], 1, shared)
