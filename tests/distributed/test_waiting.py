"""Bounded waits of the host, with works and events that are not real."""

from __future__ import annotations

import time

import pytest

from lightning_fastmoe.distributed import ExchangeWait
from lightning_fastmoe.errors import ExchangeError

WHERE = "blocks.3.moe, exchange of tokens number 7, phase counts"


class Event:
    """Is reached after so many queries."""

    def __init__(self, queries: float) -> None:
        self.left = queries

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


class Work:
    """Completes in the given slice, or fails in it."""

    def __init__(self, slices: float, error: str | None = None) -> None:
        self.left, self.error, self.waited = slices, error, []

    def wait(self, timeout) -> None:
        self.waited.append(timeout.total_seconds())
        self.left -= 1
        if self.left >= 0:
            time.sleep(timeout.total_seconds())
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return self.left < 0


class Peers:
    """Other ranks that say what they are told to."""

    def __init__(self, hopeless: str | None = None) -> None:
        self.said, self.told = hopeless, []

    @property
    def has_failed(self) -> bool:
        return self.said is not None

    def failure(self) -> str | None:
        return self.said

    def hopeless(self) -> str | None:
        return self.said

    def give_up(self, reason: str) -> str:
        self.told.append(reason)
        return f"{reason}\n  rank 1: saving"


def test_an_event_that_is_reached_costs_one_query_and_no_sleep():
    slept = []
    event = Event(0)
    ExchangeWait(1.0).for_event(event, WHERE, slept.append)
    assert (event.left, slept) == (-1, [])


def test_a_short_wait_for_an_event_gives_way_without_sleeping():
    slept = []
    ExchangeWait(1.0).for_event(Event(5), WHERE, slept.append)
    assert slept == [0.0] * 4


def test_sleeps_stay_within_a_sixteenth_of_the_wait_and_a_millisecond(monkeypatch):
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append((seconds, now[0]))
        now[0] += max(seconds, 1e-5)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(ExchangeError):
        ExchangeWait(0.5).for_event(Event(float("inf")), WHERE, sleep)
    assert all(seconds <= min(1e-3, waited / 16) for seconds, waited in slept)
    assert all(seconds == 0.0 for seconds, waited in slept if waited < 2e-3)
    assert max(seconds for seconds, _ in slept) == 1e-3
    assert 0.5 <= now[0] < 0.502


@pytest.mark.parametrize("kind", ["work", "event"])
def test_the_deadline_names_layer_rank_limit_and_the_others(kind):
    peers = Peers()
    wait = ExchangeWait(0.2, peers, rank=5)
    wait_for, what = {
        "work": (wait.for_work, Work(float("inf"))),
        "event": (wait.for_event, Event(float("inf"))),
    }[kind]
    with pytest.raises(ExchangeError) as caught:
        wait_for(what, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: rank 5 has waited 0.2")
    assert "(exchange_timeout=0.2).\n  rank 1: saving\n" in message
    assert len(peers.told) == 1


def test_a_rank_that_others_flags_stop_says_why_they_gave_up():
    class SaysLater(Peers):
        """Another rank's reason arrives when it has been asked for twice."""

        asked = 0

        def failure(self) -> str | None:
            self.asked += 1
            return "rank 1 has left: its disk is full" if self.asked > 2 else None

    peers = SaysLater()
    text = ExchangeWait(60.0, peers, rank=5).ended(WHERE, "Given up: rank 1.", told=True)
    assert text.startswith(f"{WHERE}: Given up: rank 1.\nrank 1 has left: its disk is full\n")
    assert "Every rank must run the same MoE layers" in text
    assert peers.told == []


@pytest.mark.parametrize("late", [True, False])
def test_a_rank_that_others_flags_stop_first_tells_the_others(late):
    peers = Peers()
    text = ExchangeWait(60.0, peers, rank=5).ended(WHERE, "Missing: rank 1.", late=late)
    waited = "rank 5 has waited 60 s for the other ranks (exchange_timeout=60). " if late else ""
    assert text.startswith(f"{WHERE}: {waited}Missing: rank 1.\n  rank 1: saving\n")
    assert len(peers.told) == 1


def test_slices_of_a_work_end_with_the_deadline_and_go_on_until_it_completes():
    work = Work(2)
    ExchangeWait(2.5).for_work(work, WHERE)
    assert work.waited[:2] == pytest.approx([1.0, 1.0], abs=0.01)
    assert work.waited[2] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("error", [None, "Connection closed by peer"])
def test_a_work_may_complete_between_the_end_of_a_slice_and_the_look_at_it(error):
    class Late(Work):
        """Completes as soon as a slice has ended without it."""

        def is_completed(self) -> bool:
            self.left = 0
            return True

    work = Late(float("inf"), error)
    wait = ExchangeWait(60.0, look=1e-3)
    if error is None:
        wait.for_work(work, WHERE)
    else:
        with pytest.raises(ExchangeError, match=f"failed on rank None: {error}"):
            wait.for_work(work, WHERE)
    assert len(work.waited) == 2


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_wait_without_hope_ends_at_the_next_look(seconds):
    with pytest.raises(ExchangeError, match="number 7, phase counts: rank 1 has left"):
        ExchangeWait(seconds, Peers("rank 1 has left the run")).for_work(Work(9), WHERE)


def test_no_exchange_begins_once_a_rank_has_given_up():
    ExchangeWait(60.0, Peers()).begin(WHERE)
    with pytest.raises(ExchangeError, match="number 7, phase counts: rank 1 has left"):
        ExchangeWait(60.0, Peers("rank 1 has left the run")).begin(WHERE)


def test_a_collective_that_fails_says_so_and_why():
    work = Work(0, "Connection closed by peer")
    wait = ExchangeWait(60.0, Peers("rank 1 has left the run"), rank=0)
    with pytest.raises(
        ExchangeError, match="failed on rank 0: Connection closed by peer\nrank 1 has left"
    ):
        wait.for_work(work, WHERE)
