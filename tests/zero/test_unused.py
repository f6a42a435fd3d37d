"""A parameter that takes no part in a step has no gradient in it, not that of the step before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from strategy.exactness import assert_close
from strategy.models import Case
from zero import unused_runs as runs

CASE = Case(world=2, ep=2, steps=6, coefficients=(0.0, 0.0))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("stage", "extra"), [(1, {}), (2, {}), (3, {}), (3, {"offload_optimizer": True})]
)
def test_it_stays_where_it_is(rank_pool, stage, extra, accumulate):
    case = replace(CASE, stage=stage, extra=extra, accumulate=accumulate, steps=6 // accumulate)
    plain = runs.plain(case)
    for trained in rank_pool.run(runs.fit, 2, case):
        for name, weight in plain.items():
            assert_close(trained[name], weight, name)
