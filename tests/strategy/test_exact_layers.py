"""FastMoEStrategy(exact=True): every layer has the bits of one process, and trains as one does."""

from __future__ import annotations

import pytest
from strategy import exact_layer_runs as runs
from strategy.exactness import assert_same, ident
from strategy.models import Case, reference

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.errors import ConfigError

WAYS = {"dedup": "DedupSchedule", "symmetric": "SymmetricSchedule"}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "case",
    [
        Case(world=2, ep=2, stage=1),
        Case(world=2, ep=2, stage=3, accumulate=2, in_configure_model=True),
        Case(world=4, ep=2, stage=2),
    ],
    ids=ident,
)
def test_training_equals_one_process(name: str, case: Case, rank_pool) -> None:
    expected = reference(case)
    for trace, ways in rank_pool.run(runs.train, case.world, name, case):
        assert ways == (WAYS[name],) * 2
        assert_same(trace, expected)


def test_one_layer_alone(rank_pool) -> None:
    case = Case(world=2, ep=2)
    expected = reference(case)
    for trace, schedules in rank_pool.run(runs.train, 2, "dedup", case, True):
        assert schedules == ("DedupSchedule", "ExactSchedule")
        assert_same(trace, expected)


def test_a_layer_that_can_not_is_named(rank_pool) -> None:
    for error in rank_pool.run(runs.refused, 2):
        assert error == (
            "net.moes.1: exact=True is not possible with dispatcher='dedup_overlapped', whose"
            " numbers equal those of one process up to rounding only. Choose one of: auto, local,"
            " dedup, symmetric."
        )


def test_it_is_a_bool() -> None:
    with pytest.raises(ConfigError, match="exact='yes'"):
        FastMoEStrategy(exact="yes")
