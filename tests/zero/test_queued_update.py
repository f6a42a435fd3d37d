"""The update is queued before the host knows whether to take the step."""

from __future__ import annotations

from dataclasses import replace

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
        ([0, 0, 0, 1, 0, 7, -7], Verdict(has_late_edits=True)),
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


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("maximize", [False, True]),
        ("maximize", [False, False, True, True]),
        ("fused", [True, False]),
        ("lr", [0.01, "as a tensor", 0.002, 0.05]),
        ("weight_decay", [0.0, 0.3]),
    ],
)
def test_options_that_come_between_steps_hold_in_the_next(rank_pool, world, option, values):
    """Also those that the kernel of the queued update doesn't know."""
    case = Case(world, world, 2, fused=True, steps=4)
    queued = rank_pool.run(runs.with_options, world, case, option, values)
    plain = rank_pool.run(runs.with_options, world, replace(case, fused=False), option, values)
    for (error, weights), (_, wanted) in zip(queued, plain, strict=True):
        assert error == ""
        assert weights.keys() == wanted.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"), [("maximize", True), ("amsgrad", True), ("lr", 0.5), ("lr", None)]
)
def test_options_of_one_rank_are_an_error_on_all(rank_pool, option, value):
    case = Case(2, 1, 2, fused=True, steps=3)
    values = [{"lr": "as a tensor"}.get(option, False), value]
    for error, _ in rank_pool.run(runs.with_options, 2, case, option, values, 1, timeout=60):
        assert f"Option '{option}' of the optimizer's group 0" in error


def test_a_rate_may_be_a_tensor_on_one_rank(rank_pool):
    case = Case(2, 1, 2, fused=True, steps=3)
    arguments = case, "lr", ["as a tensor"], 1
    assert [e for e, _ in rank_pool.run(runs.with_options, 2, *arguments, timeout=60)] == ["", ""]
