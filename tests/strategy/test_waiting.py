"""Ranks that wait for each other in vain get an error that says where each of them is."""

from __future__ import annotations

import pytest
import torch
from strategy import waiting_runs as runs
from strategy.models import Case

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.testing import RankError


def assert_all_ranks_say(results, *words: str) -> None:
    for rank, (kind, message, _) in enumerate(results):
        assert kind == "ExchangeError", (rank, kind, message)
        for word in words:
            assert word in message, (rank, message)


def test_a_forward_pass_on_rank_zero_alone_ends_at_the_deadline_on_all_ranks(rank_pool):
    results = rank_pool.run(
        runs.fails,
        2,
        runs.RankZeroSampleThenBarrier,
        1000.0,
        {"exchange_timeout": 2.0},
        timeout=60,
    )
    assert_all_ranks_say(
        results,
        "net.moes.0, exchange of tokens number",
        "phase counts: rank 0 has waited 2",
        "exchange_timeout=2",
        "rank 0: training, optimizer steps done: 1; waits in exchange of tokens",
        "in sample_on_rank_zero (waiting_runs.py",
        "rank 1: training, optimizer steps done: 1; no exchange of tokens is pending",
        "in barrier (",
        "on_rank_zero",
    )
    assert max(seconds for *_, seconds in results) < 40


@pytest.mark.parametrize("callback", [runs.RankZeroSampleThenBarrier, runs.RankZeroSample])
def test_ranks_that_wait_for_each_other_are_found_before_the_deadline(rank_pool, callback):
    results = rank_pool.run(runs.fails, 2, callback, 2.0, {}, timeout=60)
    assert_all_ranks_say(results, "net.moes.0", "that can never finish: all ranks are waiting")


def test_a_forward_pass_on_rank_zero_alone_is_found_where_the_others_train_on(rank_pool):
    """Its exchange is taken for the first of their next step; the one after it shows that."""
    results = rank_pool.run(runs.fails, 2, runs.RankZeroSampleOfABatch, 1000.0, {}, timeout=60)
    assert_all_ranks_say(results, "in different exchanges", "same layer: False", "on_rank_zero")
    assert max(seconds for *_, seconds in results) < 30


@pytest.mark.parametrize(
    ("second", "is_hopeless"),
    [((7, "net.moes.1"), True), ((7, "net.moes.0"), False), ((9, "net.moes.1"), False)],
    ids=["another layer", "the same exchange", "an exchange of another group"],
)
def test_ranks_that_stand_in_exchanges_of_different_layers_are_found(
    rank_pool, second, is_hopeless
):
    """Over NCCL nothing else tells: what differs before the exchange never ends."""
    exchanges = ((7, "net.moes.0"), second)
    found = rank_pool.run(runs.stuck_in, 2, exchanges, 12.0, timeout=60)
    if not is_hopeless:
        assert found == [None, None]
        return
    for said in found:
        assert "can never finish" in said
        assert "rank 0: training; waits in exchange of tokens number 7: net.moes.0" in said
        assert "rank 1: training; waits in exchange of tokens number 7: net.moes.1" in said


@pytest.mark.parametrize(
    ("where", "dispatcher"),
    [
        (runs.OtherRankLeaves, "auto"),
        (runs.OtherRankLeaves, "symmetric"),
        (runs.OtherRankLeavesAfterTheEpoch, "auto"),
    ],
)
def test_an_error_of_one_rank_is_told_to_those_that_wait_for_it(rank_pool, where, dispatcher):
    waiting, left = rank_pool.run(runs.fails, 2, where, 1000.0, {}, "cpu", dispatcher, timeout=60)
    assert left[:2] == ("ValueError", "the disk of rank 1 is full")
    assert_all_ranks_say([waiting], "rank 1 has left the run with ValueError: the disk of rank 1")


ENDS = [
    (ValueError("a bug"), "rank 1 has left the run with ValueError: a bug"),
    (SystemExit(3), "rank 1 has left the run with SystemExit: 3"),
    (KeyboardInterrupt(), "rank 1 has left the run with KeyboardInterrupt"),
]


@pytest.mark.parametrize(("error", "said"), ENDS)
def test_ranks_are_told_in_whatever_way_one_ends(rank_pool, error, said):
    """Also if a script catches it, and the process lives on."""
    waiting, _ = rank_pool.run(runs.ends_with, 2, Case(2, 2), error, False, timeout=60)
    rank_pool.close()  # gloo waits for what is still under way before a group's memory is freed
    assert_all_ranks_say([waiting], said)


@pytest.mark.parametrize(("error", "said"), ENDS)
def test_ranks_that_wait_in_a_reduction_are_told_why_the_connection_broke(rank_pool, error, said):
    with pytest.raises(RankError) as caught:
        rank_pool.run(runs.ends_with, 2, Case(2, 1), error, True, timeout=60)
    assert_all_ranks_say([caught.value.results[0]], said)


def test_a_late_rank_is_waited_for(rank_pool):
    results = rank_pool.run(runs.fails, 2, runs.RankIsLate, 1.0, {"exchange_timeout": 30.0})
    assert [kind for kind, *_ in results] == ["nothing"] * 2


@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("stage", [2, 3])
def test_layers_that_one_rank_leaves_out_are_an_error_on_all(rank_pool, stage, skipped):
    results = rank_pool.run(runs.leaves_out, 2, stage, skipped, timeout=60)
    assert_all_ranks_say(results, "in different exchanges", "must run the same MoE layers")
    assert max(seconds for *_, seconds in results) < 30


@pytest.mark.parametrize("skipped", [(0,), (0, 1)])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_takes_part_without_tokens(rank_pool, stage, skipped):
    losses, weights = runs.in_one_process(skipped)
    results = rank_pool.run(runs.takes_part, 2, stage, skipped, timeout=60)
    for rank, (own, last) in enumerate(results):
        assert own == pytest.approx(losses[rank], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(last[name], weight, rtol=2e-5, atol=2e-6)


def test_the_deadline_is_nine_tenths_of_the_hang_timeout_unless_given():
    assert FastMoEStrategy()._waits.seconds == 540.0
    assert FastMoEStrategy(hang_timeout=100)._waits.seconds == 90.0
    assert FastMoEStrategy(hang_timeout=None)._waits.seconds is None
    assert FastMoEStrategy(exchange_timeout=7)._waits.seconds == 7
    with pytest.raises(ConfigError, match=r"exchange_timeout=0"):
        FastMoEStrategy(exchange_timeout=0)
