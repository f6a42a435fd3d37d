"""NaN on one rank: all ranks stop, skip or go on alike."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from strategy import nonfinite_runs as runs
from strategy.models import Case

CASE = Case(world=2, ep=2, steps=4)
BAD = 1


def policy(name: str, **changes) -> Case:
    return replace(CASE, extra={"nonfinite": name}, **changes)


def assert_equal(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.isfinite(weight).all()
        assert torch.equal(actual[name], weight), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_raise_stops_all_ranks_before_any_weight_changes(rank_pool, stage):
    results = rank_pool.run(runs.fit, 2, policy("raise", stage=stage), BAD)
    for result in results:
        assert len(result.weights) == BAD
        assert "net.moes.0" in result.error
        assert "nonfinite='skip'" in result.error
        assert_equal(result.at_the_end, result.weights[0])


@pytest.mark.parametrize(
    ("stage", "accumulate", "world"),
    [(1, 1, 2), (2, 2, 2), (3, 1, 2), (3, 2, 2), (2, 1, 4)],
)
def test_skip_leaves_the_step_out_on_all_ranks(rank_pool, stage, accumulate, world):
    case = policy("skip", stage=stage, accumulate=accumulate, world=world)
    skipped = rank_pool.run(runs.fit, world, case, BAD)
    expected = rank_pool.run(runs.fit, world, case, None, 0, BAD)
    for result, twin in zip(skipped, expected, strict=True):
        assert result.error == twin.error == ""
        assert len(result.weights) == 4
        assert_equal(result.weights[BAD], result.weights[BAD - 1])
        del result.weights[BAD]
        for own, other in zip(result.weights, twin.weights, strict=True):
            assert_equal(own, other)
    first, last = skipped[0].weights[0], skipped[0].weights[-1]
    assert all(not torch.equal(first[name], last[name]) for name in first)


def test_a_bad_last_micro_batch_skips_the_step_too(rank_pool):
    case = policy("skip", accumulate=2)
    skipped = rank_pool.run(runs.fit, 2, case, BAD, 1)
    expected = rank_pool.run(runs.fit, 2, case, None, 0, BAD)
    for result, twin in zip(skipped, expected, strict=True):
        assert_equal(result.at_the_end, twin.at_the_end)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize(
    ("stage", "precision", "bad"),
    [
        (1, "32-true", 1),
        (2, "32-true", 3),
        (2, "bf16-mixed", 1),
        (3, "32-true", 1),
        (3, "bf16-mixed", 1),
    ],
)
def test_a_skipped_step_moves_no_router_bias_and_no_average(
    rank_pool, stage, precision, bad, averaged
):
    """Of the last step the weights don't tell; those that follow one are taken again."""
    case = policy("skip", stage=stage, precision=precision)
    skipped = rank_pool.run(runs.moved, 2, case, bad, None, averaged)
    expected = rank_pool.run(runs.moved, 2, case, None, bad, averaged)
    for found, twin in zip(skipped, expected, strict=True):
        assert twin["bias"].abs().sum() > 0
        assert_equal(found, twin)


def test_an_average_is_that_of_its_own_training(rank_pool):
    """Lightning's callback remembers the last step of the one before."""
    for first, second in rank_pool.run(runs.moved_twice, 2, CASE):
        assert_equal(second, first)


def test_the_first_step_can_be_skipped(rank_pool):
    case = policy("skip")
    skipped = rank_pool.run(runs.fit, 2, case, 0)
    expected = rank_pool.run(runs.fit, 2, case, None, 0, 0)
    for result, twin in zip(skipped, expected, strict=True):
        assert_equal(result.at_the_end, twin.at_the_end)


@pytest.mark.parametrize("stage", [2, 3])
def test_ignore_raises_nothing_and_keeps_ranks_alike(rank_pool, stage):
    # ZeRO itself then drops a step whose gradient norm is NaN, as it does with fp16.
    first, second = rank_pool.run(runs.fit, 2, policy("ignore", stage=stage), BAD)
    assert first.error == second.error == ""
    assert math.isnan(second.losses[BAD])
    assert len(first.losses) == len(first.weights) == 4
    assert_equal(first.at_the_end, second.at_the_end)


@pytest.mark.parametrize("name", ["raise", "skip"])
def test_good_batches_pass(rank_pool, name):
    checked = rank_pool.run(runs.fit, 2, policy(name))
    unchecked = rank_pool.run(runs.fit, 2, policy("ignore"))
    for result, twin in zip(checked, unchecked, strict=True):
        assert_equal(result.at_the_end, twin.at_the_end)
