"""The expert parallel size by memory: the plan at each size, and which one is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.nn import moe_layers
from lightning_fastmoe.nn.placement import Placement, expert_placement
from lightning_fastmoe.planning.parallel_size import (
    SHARE,
    SizeChoice,
    buffers_at,
    bytes_at,
    groups_at,
    smallest_that_fits,
)

D, F, E, WORLD = 32, 48, 8, 4
EXPERTS = 2 * E * (3 * D * F)
DENSE = 2 * E * D + D * D


def model(sharded_over: int = 1) -> tuple[nn.Module, list[MoE]]:
    """Two layers with ``EXPERTS`` parameters in experts, and ``DENSE`` others."""
    each = E // sharded_over
    with expert_placement(lambda num_experts: Placement(tuple(range(each)))):
        module = nn.Sequential(MoE(D, F, E, 2), MoE(D, F, E, 2), nn.Linear(D, D, bias=False))
    return module, [layer for _, layer in moe_layers(module)]


@pytest.mark.parametrize("sharded_over", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_don_t_depend_on_what_is_on_this_rank(size: int, sharded_over: int) -> None:
    module, layers = model(sharded_over)
    dense, experts = groups_at(module, layers, size, WORLD)
    assert sum(dense.sizes) == DENSE
    assert (dense.ranks, dense.experts) == (WORLD, False)
    assert sum(experts.sizes) == EXPERTS // size
    assert (experts.ranks, experts.experts) == (WORLD // size, True)


def test_frozen_parameters_are_groups_of_their_own() -> None:
    module, layers = model()
    layers[0].requires_grad_(False)
    groups = groups_at(module, layers, 2, WORLD)
    found = {(g.experts, g.requires_grad): sum(g.sizes) for g in groups}
    assert found == {
        (False, True): E * D + D * D,
        (False, False): E * D,
        (True, True): EXPERTS // 4,
        (True, False): EXPERTS // 4,
    }


def needed(size: int) -> float:
    """Stage 1 in bf16: weights and gradients whole, 12 bytes of each parameter partitioned."""
    return 4 * (DENSE + EXPERTS / size) + 12 * (DENSE + EXPERTS) / WORLD


@pytest.mark.parametrize(
    ("memory", "size", "fits"),
    [
        (needed(1) / SHARE * 1.01, 1, True),
        (needed(1) / SHARE * 0.99, 2, True),
        (needed(2) / SHARE * 1.01, 2, True),
        (needed(2) / SHARE * 0.99, 4, True),
        (needed(4) / SHARE * 0.99, 4, False),
        (1, 4, False),
    ],
)
def test_the_smallest_size_that_fits_is_taken(memory: float, size: int, fits: bool) -> None:
    module, layers = model(4)
    options = {"world": WORLD, "stage": 1, "itemsize": torch.bfloat16.itemsize, "config": {}}
    found = bytes_at(module, layers, [1, 2, 4], **options)
    choice = smallest_that_fits([1, 2, 4], found, [0, 0, 0], int(memory))
    assert (choice.size, choice.fits) == (size, fits)
    assert choice.needed == pytest.approx(needed(size), rel=1e-3)


def test_buffers_of_the_exchange_count() -> None:
    """Beside the state, where the tokens are known; then the next size may be the first to fit."""
    _, layers = model()
    assert buffers_at(layers, [1, 2, 4], tokens=None, itemsize=2) == [0, 0, 0]
    none, *found = buffers_at(layers, [1, 2, 4], tokens=1000, itemsize=2)
    # Two halves of R blocks: 1,000 rows of 64 + 16 bytes and an eighth, in steps of 64 KiB.
    assert none == 0
    assert found == [2 * r * (2 * 2**16 + 8 * 4102) + 5 * r * 128 for r in (2, 4)]
    # A row for each of two slots.
    found = buffers_at(layers, [2, 4], tokens=1000, itemsize=2, exact=True)
    assert found == [2 * r * (3 * 2**16 + 8 * 4102) + 5 * r * 128 for r in (2, 4)]
    choice = smallest_that_fits([1, 2, 4], [900, 500, 300], [0, 150, 200], 1000)
    assert (choice.size, choice.needed, choice.buffers, choice.fits) == (4, 500, 200, True)
    assert smallest_that_fits([1, 2, 4], [900, 500, 300], [0, 0, 0], 1000).size == 2


def test_says_why() -> None:
    assert str(SizeChoice(1, 2**29, 2**30)) == (
        "expert_parallel_size='auto' is 1, the smallest that fits: weights, gradients and Adam's"
        " state take 0.5 of 1.0 GiB per rank (limit 60%)."
    )
    buffers = str(SizeChoice(2, 2**29, 2**30, 2**27))
    assert (
        "Adam's state and buffers for the exchange of tokens (0.1 GiB) take 0.5 of 1.0" in buffers
    )
    large = str(SizeChoice(2, 2**30, 2**30))
    assert "is 2, the largest that divides the experts and stays in a node" in large
