"""expert_parallel_size="auto" looks at every layer, wherever the model is built."""

from __future__ import annotations

import pytest
import torch
from strategy.auto_size_runs import built, written_early
from strategy.models import Case


@pytest.mark.parametrize(
    ("world", "experts", "size", "modules"),
    [
        (2, (4, 5), 1, False),
        (2, (6, 4), 2, False),
        (4, (4, 6), 2, False),
        (4, (6, 4), 2, False),
        (4, (8, 4, 6), 2, True),
        (4, (4, 6, 5), 1, True),
    ],
)
def test_every_layer_counts(
    world: int, experts: tuple[int, ...], size: int, modules: bool, rank_pool
) -> None:
    """Built in ``__init__`` or not, one by one or not: the same size, and the same numbers."""
    case = Case(world=world, ep="auto", num_experts=experts, steps=2, in_configure_model=True)
    whole = rank_pool.run(built, world, case, len(experts), modules)
    for in_init in (0, 1):
        outcomes = rank_pool.run(built, world, case, in_init, modules)
        for expected, (ep_size, local, weights) in zip(whole, outcomes, strict=True):
            assert ep_size == expected[0] == size
            assert local == expected[1] == [e // size for e in experts]
            assert weights.keys() == expected[2].keys()
            for name, value in expected[2].items():
                assert torch.equal(weights[name], value), name


def test_weights_that_would_be_lost(rank_pool) -> None:
    case = Case(world=4, ep="auto", num_experts=(4, 6), in_configure_model=True)
    for message in rank_pool.run(written_early, 4, case):
        assert "chose 4 for a layer of 4 experts, but a later layer of 6" in message
        assert "Pass expert_parallel_size=2" in message
