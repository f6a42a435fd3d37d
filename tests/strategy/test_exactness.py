"""Any (expert parallel, data parallel, ZeRO stage) trains to the numbers of one plain process."""

from __future__ import annotations

import pytest
from pairwise import covering
from strategy.exactness import assert_same, axes, cases, ident
from strategy.models import Case, reference
from strategy.tracing import EarlyOptimizer, run_case, run_case_by

from lightning_fastmoe.distributed.schedule import ACROSS_RANKS, AUTO


@covering("case", cases(), by=axes, ids=ident)
def test_training_equals_one_process(case: Case, rank_pool) -> None:
    expected = reference(case)
    assert max(expected.norms) > case.clip, "the case must really clip"
    for trace in rank_pool.run(run_case, case.world, case):
        assert_same(trace, expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_epoch_that_is_no_multiple_of_the_accumulation(stage: int, rank_pool) -> None:
    """The last, short group of micro-batches is stepped on; nothing spills into the next epoch."""
    case = Case(world=2, ep=2, stage=stage, accumulate=2, batches_per_epoch=3, epochs=2)
    expected = reference(case)
    assert len(expected.weights) == 4
    for trace in rank_pool.run(run_case, case.world, case):
        assert_same(trace, expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_made_before_experts_are_sharded(stage: int, rank_pool) -> None:
    """Parameters stay the same objects."""
    case = Case(world=2, ep=2, stage=stage)
    expected = reference(case)
    for trace in rank_pool.run(run_case, case.world, case, EarlyOptimizer):
        assert_same(trace, expected)


@pytest.mark.parametrize("name", [name for name in ACROSS_RANKS if name != AUTO])
@pytest.mark.parametrize(
    "case",
    [
        Case(world=2, ep=2, stage=1),
        Case(world=2, ep=2, stage=3, accumulate=2, in_configure_model=True),
        Case(world=4, ep=2, stage=2),
    ],
    ids=ident,
)
def test_every_way_of_exchanging_tokens(name: str, case: Case, rank_pool) -> None:
    expected = reference(case)
    for trace in rank_pool.run(run_case_by, case.world, name, case):
        assert_same(trace, expected)
