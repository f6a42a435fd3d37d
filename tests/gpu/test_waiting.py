"""Over NCCL as over gloo: ranks that wait in vain get an error, and rank 0 can sample alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu.sharing import run
from strategy import waiting_runs as runs
from strategy.models import Case, Net

from lightning_fastmoe.testing import RankError, RankPool


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def test_a_forward_pass_on_rank_zero_alone_ends_at_the_deadline(
    rank_pool: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 is in NCCL's barrier, which nothing interrupts: its process ends and says why."""
    begin = time.monotonic()
    with pytest.raises(RankError):
        run(
            rank_pool,
            runs.fails,
            2,
            runs.RankZeroSampleThenBarrier,
            1e3,
            {"exchange_timeout": 3.0},
            "cuda",
            timeout=100,
        )
    assert time.monotonic() - begin < 90
    said = capfd.readouterr().err
    assert "rank 1: another rank has given up, and this one is still blocked" in said
    assert "net.moes.0, exchange of tokens number" in said
    assert "rank 0 has waited 3 s for the other ranks (exchange_timeout=3)" in said
    assert "in barrier (" in said


def ends(
    pool: RankPool, capfd: pytest.CaptureFixture[str], function: Callable[..., Any], *args: Any
) -> list[tuple[str, str]]:
    """Name and text of each rank's error, which arrives, or is printed if the device is blocked.

    "blocked" is the name where a rank has no error of its own when its process ends.
    """
    pool.close()  # workers of an earlier test would print to where nobody looks any more
    try:
        results = dict(enumerate(run(pool, function, 2, *args, "cuda", timeout=110)))
    except RankError as error:
        results, said = error.results, capfd.readouterr().err
        for rank, died in error.errors.items():
            if died != ("ProcessDied", "the worker ended with status 75"):
                raise
            results[rank] = last_words(rank, said)
        if sorted(results) != [0, 1]:
            raise
    return [results[rank][:2] for rank in (0, 1)]


def last_words(rank: int, said: str) -> tuple[str, str]:
    """What the process of a rank printed when it ended itself."""
    before, found, after = said.partition(f"lightning_fastmoe, rank {rank}: another rank has given")
    if found:
        return "blocked", after
    end = f"\nlightning_fastmoe, rank {rank}: 30 s after this error, the device still"
    assert said.count(end) == 1, said
    last = said.split(end)[0].rpartition("Traceback (most recent call last)")[2]
    error = re.search(r"^(?:\w+\.)*(\w+Error): ", last, re.MULTILINE)
    assert error is not None, last
    return error[1], last[error.end() :]


def test_an_error_of_one_rank_is_told_to_those_that_wait_for_it(
    rank_pool: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    waiting, left = ends(rank_pool, capfd, runs.fails, runs.OtherRankLeaves, 1000.0, {})
    assert left == ("ValueError", "the disk of rank 1 is full")
    assert waiting[0] == "ExchangeError", waiting
    assert "rank 1 has left the run with ValueError: the disk of rank 1" in waiting[1]


@pytest.mark.parametrize(("stage", "skipped"), [(2, (0,)), (2, (0, 1)), (3, (0,))])
def test_layers_that_one_rank_leaves_out_are_an_error_on_all(
    stage: int, skipped: tuple[int, ...], rank_pool: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are found in different exchanges, long before the deadline."""
    found = ends(rank_pool, capfd, runs.leaves_out, stage, skipped, 1000.0)
    for rank, (kind, message) in enumerate(found):
        assert kind == "ExchangeError", (rank, kind, message)
        assert "in different exchanges" in message


def test_a_rank_that_leaves_out_all_layers_under_zero_3_is_found_at_the_deadline(
    rank_pool: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of the ranks waits for the device, in a gather that the other is not in."""
    found = ends(rank_pool, capfd, runs.leaves_out, 3, (0, 1), 10.0)
    kinds = [kind for kind, _ in found]
    assert "ExchangeError" in kinds, found
    assert set(kinds) <= {"ExchangeError", "blocked"}, found
    for _, message in found:
        assert re.search(r"rank \d has waited 10 s for the other ranks", message), message
        assert "(exchange_timeout=10)" in message
        for rank in (0, 1):
            assert f"rank {rank}: training, optimizer steps done: 0; " in message


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_takes_part_without_tokens(stage: int, rank_pool: RankPool) -> None:
    losses, weights = runs.in_one_process((0, 1))
    results = run(rank_pool, runs.takes_part, 2, stage, (0, 1), "cuda", timeout=90)
    for rank, (own, last) in enumerate(results):
        assert own == pytest.approx(losses[rank], rel=2e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(last[name].cpu(), weight, rtol=5e-5, atol=5e-6)


def test_rank_zero_draws_what_the_whole_model_says(rank_pool: RankPool) -> None:
    results = run(
        rank_pool, runs.draws, 2, 2, 2, 2, "32-true", runs.three_passes, "cuda", timeout=90
    )
    assert [r["error"] for r in results] == [("nothing", "")] * 2, results
    whole = Net(Case())
    for drawn, step in zip(results[0]["drawn"], (1, 3), strict=True):
        whole.net.load_state_dict(results[0]["weights"][step], strict=True)
        for found, tokens in zip(drawn, (1, 3, 0), strict=True):
            with torch.no_grad():
                right = runs.residual(whole, runs.sample_input(tokens))
            torch.testing.assert_close(found.cpu(), right, rtol=2e-5, atol=2e-6)
