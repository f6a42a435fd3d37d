"""The update is queued before the host knows whether to take the step."""

from __future__ import annotations

import pytest
import torch
from strategy.contents import assert_goes_on
from strategy.midway_runs import ACCUMULATE
from strategy.models import Case
from zero import queued_update_runs as runs

from lightning_fastmoe.zero.verdict import PendingVerdict, Verdict


@pytest.mark.parametrize("world", [1, 2])
def test_each_update_is_queued_before_its_verdict_is_read(rank_pool, world):
    case = Case(world, world, 2, fused=True, steps=3)
    for calls in rank_pool.run(runs.order_of_calls, world, case):
        assert calls == ["_update_all", "read"] * case.steps


@pytest.mark.parametrize("steps", [1, 3])
def test_a_refused_step_leaves_the_optimizers_state(rank_pool, steps):
    """A first one leaves none: a checkpoint tells none from zeros."""
    case = Case(2, 2, 1, fused=True, steps=steps)
    for error, entries, numbers in rank_pool.run(runs.state_after_refusal, 2, case):
        assert f"step {steps - 1} was not taken" in error
        assert (entries > 0) == (steps > 1)
        assert numbers == [steps - 1.0] * entries


STEP = 2


@pytest.mark.parametrize(
    ("times", "later"),
    [(1, False), (2, False), (2, True)],
    ids=["once", "twice, by a launcher", "again later"],
)
def test_ctrl_c_while_the_verdict_is_read_waits_until_the_step_is_counted(
    rank_pool, tmp_path, times, later
):
    """Else what is saved would count a step less than its weights have taken."""
    case = Case(1, 1, 2, ACCUMULATE, fused=True)
    arguments = case, STEP, times, later, str(tmp_path)
    [(counted, taken, straight, rest)] = rank_pool.run(runs.interrupted, 1, *arguments)
    if later:  # doesn't wait
        assert (counted, taken) == (STEP - 1, STEP - 1)
    else:
        assert (counted, taken) == (STEP, STEP)
        assert_goes_on(straight, rest, STEP * ACCUMULATE)


NAMES = ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "verdict"),
    [
        ([0, 0, 0, 0, 0, 7, -7], Verdict()),
        ([0, 1, 0, 0, 0, 7, -7], Verdict(bad=("b",))),
        ([0, 0, 1, 0, 0, 7, -7], Verdict(is_norm_finite=False)),
        ([0, 0, 0, 1, 0, 7, -7], Verdict(samples_differ=True)),
        ([0, 0, 0, 0, 1, 7, -7], Verdict(is_refused=True)),
        ([0, 0, 0, 0, 0, 7, -6], Verdict(options_differ=True)),
        ([0, 0, 0, 0, 0, 2**31 - 1, 2**31 - 1], Verdict(options_differ=True)),
        ([1, 1, 1, 1, 1, 7, -6], Verdict(("a", "b"), True, False, True, True)),
    ],
)
def test_what_flags_say(flags, verdict):
    pending = PendingVerdict(torch.tensor(flags, dtype=torch.int32), NAMES, has_norm=True)
    assert pending.read() == verdict
    assert (int(pending.blocked) == 0) == verdict.is_clear
