"""ZeRO 3's leaf modules, whose gradients DeepSpeed reduces too early if no input requires one."""

from __future__ import annotations

from functools import partial

import pytest
from huggingface.leaf_module_runs import (
    adapters_after_training,
    error,
    other_leaf,
    other_leaf_reference,
)
from huggingface.lora_runs import reference
from huggingface.sharding_runs import Run, assert_close
from pairwise import combinations


@combinations(name=["qwen3_moe", "mixtral"], topology=[(1, 1), (2, 1), (2, 2)], accumulate=[1, 2])
def test_adapters_of_the_first_layer(
    name: str, topology: tuple[int, int], accumulate: int, rank_pool
) -> None:
    """Nothing before them is trained. The bucket is reduced whenever it has an adapter."""
    small = {"reduce_bucket_size": 64}
    world, ep = topology
    run = Run(name, world, ep, stage=3, accumulate=accumulate, steps=2, extra=small)
    expected = reference(run)
    for weights in rank_pool.run(adapters_after_training, world, run):
        for own, twin in zip(weights, expected, strict=True):
            for key, weight in twin.items():
                assert_close(own[key], weight, key)


@pytest.mark.parametrize("by_config", [False, True])
def test_experts_in_a_leaf_module_are_refused(by_config: bool, rank_pool) -> None:
    run = Run(stage=3, steps=1, in_configure_model=True)
    for found in rank_pool.run(error, 2, run, by_config):
        assert found.startswith("ConfigError: net.model.layers.")
        assert "mlp (Qwen3MoeSparseMoeBlock) is a leaf module of ZeRO 3" in found


def test_leaf_modules_without_experts(rank_pool) -> None:
    run = Run(world=1, ep=1, stage=3, accumulate=2, steps=2)
    (found,) = rank_pool.run(other_leaf, 1, run)
    for key, weight in other_leaf_reference(run).items():
        assert_close(found[key], weight, key)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "how",
    [{"frozen": True}, {"frozen": True, "evaluating": True}, {"keyword": True}],
    ids=["frozen", "in eval mode", "by keyword"],
)
def test_leaf_modules_whose_gradients_would_be_lost(
    how: dict[str, bool], accumulate: int, rank_pool
) -> None:
    run = Run(world=1, ep=1, stage=3, accumulate=accumulate, steps=2)
    (found,) = rank_pool.run(partial(other_leaf, **how), 1, run)
    assert "A Turns is a leaf module of ZeRO 3 and is trained, but no tensor among its" in found
