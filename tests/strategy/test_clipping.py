"""Gradients are clipped by what was asked for before the step, as in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from strategy import clipping_runs as runs
from strategy.models import Case, reference

from lightning_fastmoe.testing import RankError


def assert_clipped(found, case: Case) -> None:
    clipped, plain = (reference(replace(case, clip=norm)).weights[-1] for norm in (runs.NORM, 1e9))
    assert max(float((clipped[name] - plain[name]).abs().max()) for name in clipped) > 1e-3
    for weights in found:
        for name, expected in clipped.items():
            assert float((weights[name] - expected).abs().max()) < 1e-5, name


@pytest.mark.parametrize("way", ["manual", "by hand", "trainer"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_asked_for_is_used(rank_pool, stage, way):
    case = Case(2, 2, stage, 1)
    assert_clipped(rank_pool.run(runs.asked, 2, case, way), case)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_config_decides_where_nothing_is_asked_for(rank_pool, stage):
    case = Case(2, 2, stage, 2)
    assert_clipped(rank_pool.run(runs.configured, 2, case, runs.NORM, None), case)


@pytest.mark.parametrize("norm", [0, 5.0])
def test_a_config_that_contradicts_the_trainer_is_refused(rank_pool, norm):
    with pytest.raises(RankError, match=r"gradient_clipping to .*gradient_clip_val=0\.05"):
        rank_pool.run(runs.configured, 2, Case(2, 2, 2, 1), norm, runs.NORM)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_that_clip_differently_take_no_step(rank_pool, stage):
    for message, steps in rank_pool.run(runs.differing, 2, Case(2, 2, stage, 1)):
        assert "are to be clipped by 0.05 on rank 0 and by 0.1 on rank 1" in message
        assert steps == 2
