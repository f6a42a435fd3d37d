"""Schedulers, weight decay, frozen parameters: as in plain PyTorch, for experts and the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategy.exactness import assert_close
from strategy.models import Case
from zero import group_runs as runs

CASE = Case(world=2, ep=2, steps=runs.STEPS)


def assert_weights(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert_close(actual[name], weight, name)


def assert_groups(trained: runs.Trained, plain: runs.Trained) -> None:
    """Each of the two groups is split in two, which go through its hyperparameters."""
    assert trained.moe == [False, True, False, True]
    assert len(trained.groups) == len(plain.groups) == runs.STEPS
    for own, twin in zip(trained.groups, plain.groups, strict=True):
        assert own == [twin[0], twin[0], twin[1], twin[1]]


@pytest.mark.parametrize("scheduler", [name for name in runs.SCHEDULERS if name != "none"])
@pytest.mark.parametrize("stage", [2, 3])
def test_schedulers_act_as_in_plain_pytorch(rank_pool, stage, scheduler):
    case = replace(CASE, stage=stage, coefficients=(0.0, 0.0))
    plain = runs.plain(case, scheduler)
    assert len({tuple(step) for step in plain.groups}) >= 4, "the scheduler must do something"
    for trained in rank_pool.run(runs.fit, 2, case, scheduler):
        assert_groups(trained, plain)
        assert_weights(trained.weights, plain.weights)


@pytest.mark.parametrize("scheduler", ["none", "lambda", "one-cycle", "plateau"])
def test_the_monitor_logs_the_names_that_a_plain_optimizer_has(rank_pool, scheduler):
    names = runs.plain_monitor(scheduler)
    assert names >= {"lr-AdamW/pg1", "lr-AdamW/pg2"}
    assert rank_pool.run(runs.fit, 2, CASE, scheduler)[0].logged == names


@pytest.mark.parametrize("scheduler", ["none", "plateau"])
def test_a_rate_set_by_hand_stands(rank_pool, scheduler):
    # The plateau scheduler's first change comes after the second step.
    case = replace(CASE, coefficients=(0.0, 0.0), steps=2 if scheduler == "plateau" else 5)
    by_hand = {1: 0.07}
    plain = runs.plain(case, scheduler, by_hand)
    assert [rate for _, rate, _ in plain.groups[1]] == [0.07, 0.07]
    for trained in rank_pool.run(runs.fit, 2, case, scheduler, by_hand):
        rates = [[rate for _, rate, _ in step] for step in trained.groups]
        assert rates == [[step[0][1]] * 2 + [step[1][1]] * 2 for step in plain.groups]
        assert_weights(trained.weights, plain.weights)


@pytest.mark.parametrize(
    ("stage", "frozen", "trainable_only"),
    [
        (1, "moes.0.experts", False),
        (2, "moes.0.experts", True),
        (2, "moes.1.router", False),
        (2, "experts", False),
        (2, "up_", True),
        (3, "moes.0.experts", False),
        (3, "experts", True),
        (3, "router", False),
        (3, "up_", False),
    ],
)
def test_frozen_parameters_stay_and_the_rest_trains(rank_pool, stage, frozen, trainable_only):
    case = replace(CASE, stage=stage, coefficients=(0.0, 0.0))
    plain = runs.plain(case, "none", frozen=frozen)
    start = runs.plain(replace(case, steps=0), "none").weights
    for trained in rank_pool.run(runs.fit, 2, case, "none", None, frozen, trainable_only):
        assert_weights(trained.weights, plain.weights)
        for name, weight in trained.weights.items():
            assert torch.equal(weight, start[name]) == (frozen in name), name


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_the_optimizer_changes_no_weight(rank_pool, stage):
    case = replace(CASE, stage=stage)
    offloaded = replace(case, extra={"offload_optimizer": True})
    here = rank_pool.run(runs.fit, 2, case, "lambda")
    there = rank_pool.run(runs.fit, 2, offloaded, "lambda")
    for own, twin in zip(there, here, strict=True):
        assert own.groups == twin.groups
        assert_weights(own.weights, twin.weights)
