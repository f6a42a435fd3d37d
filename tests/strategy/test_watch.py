"""A run that hangs ends on all ranks and says where it hung; so does one told to end."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from strategy import watch_runs
from strategy.models import Case

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.distributed import EXCHANGE, PendingExchange
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.strategy.watchdog import sentry
from lightning_fastmoe.strategy.watchdog.sentry import Activity, Sentry
from lightning_fastmoe.strategy.watchdog.watch import Watch

TESTS = Path(__file__).parents[1]
HANG, TERMINATED, INTERRUPTED = 75, 143, 130


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """What became of all ranks of all trials, which run side by side."""
    command = [sys.executable, "-m", "strategy.watch_runs", str(tmp_path_factory.mktemp("watch"))]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hang_ends_all_ranks_and_names_layer_phase_and_stacks(trials):
    found = trials["hang"]
    assert found["status"] == [HANG, HANG], found["output"]
    waiting, stuck = found["output"]
    for output in (waiting, stuck):
        assert "The run hangs" in output
        assert "hang_timeout=3" in output
        assert "optimizer steps done: 1; batches of this run: 2" in output
    assert "net.moes.0, phase counts, for" in waiting
    assert "in exchange_counts" in waiting
    assert "none is pending; the last was number" in stuck
    assert "in stand_still" in stuck
    assert not found["launched_lives"]


def test_a_hang_in_an_exchange_that_holds_the_gil_ends_too(trials):
    found = trials["hang with the GIL"]
    assert found["status"] == [HANG, -signal.SIGKILL], found["output"]
    _, stuck = found["output"]
    assert "net.moes.0, phase dispatch, for" in stuck
    assert "in stand_still_with_the_gil" in stuck
    assert "ended by SIGKILL" in stuck


def test_sigterm_ends_a_hang_after_the_grace(trials):
    found = trials["SIGTERM"]
    assert found["status"] == [TERMINATED] * 2, found["output"]
    for output in found["output"]:
        assert "signal_grace=1.5" in output
    assert max(found["seconds"]) < 15


def test_sigterm_ends_a_hang_that_holds_the_gil(trials):
    found = trials["SIGTERM with the GIL"]
    assert found["status"] == [-signal.SIGKILL], found["output"]
    assert "in stand_still_with_the_gil" in found["output"][0]
    assert found["seconds"][0] < 20


def test_a_second_sigterm_ends_a_hang_at_once(trials):
    found = trials["two SIGTERMs"]
    assert found["status"] == [TERMINATED], found["output"]
    assert "SIGTERM arrived a second time" in found["output"][0]
    assert 2.4 < found["seconds"][0] < 15, "two signals within a moment are one request"


def test_a_second_interrupt_ends_a_hang_at_once(trials):
    found = trials["two SIGINTs"]
    assert found["status"] == [INTERRUPTED], found["output"]
    assert "SIGINT arrived a second time" in found["output"][0]


@pytest.mark.parametrize("name", ["obeyed by one", "obeyed by two"])
def test_a_run_that_sigterm_ended_is_saved_and_no_success(trials, name):
    found = trials[name]
    assert set(found["status"]) == {TERMINATED}, found["output"]
    assert found["saved"]
    output = "".join(found["output"])
    assert "lightning_fastmoe, rank" not in output
    assert "Exception in thread" not in output
    # SIGTERM, once obeyed, is not sent to launched ranks: it would be the second to their watch.
    assert found["launched_lives"] == (name == "obeyed by two")


def test_sigterm_in_a_validation_is_no_success_either(rank_pool):
    found = rank_pool.run(watch_runs.terminated_while_validating, 1, Case(1, 1, steps=1))
    assert found == [(TERMINATED, 2)]


def test_nothing_is_left_after_runs_failed_runs_and_evaluation(rank_pool):
    for left in rank_pool.run(watch_runs.left_after_runs, 2, Case(2, 2, steps=2)):
        assert left == {"fit": [], "failed fit": [], "validate": [], "fit again": []}


def test_batches_of_a_long_validation_are_progress(rank_pool):
    seconds, batches = rank_pool.run(watch_runs.long_validation, 1, Case(1, 1, steps=1))[0]
    assert batches == watch_runs.VALIDATION_BATCHES
    assert seconds > 2 * watch_runs.VALIDATION_LIMIT


def test_start_and_stop_leave_no_descriptor_and_no_thread():
    watch = Watch(60, 60)
    before = watch_runs.descriptors()
    for _ in range(2):
        watch.start(0, torch.device("cpu"))
        assert len(watch_runs.left()) == 4, "the test sees a watch that runs"
        watch.stop()
        watch.stop()
        assert watch_runs.left() == []
        assert watch_runs.descriptors() == before
    watch.beat(Activity.TRAINING)  # goes nowhere, as does a save after the run


def test_a_process_whose_run_is_over_is_left_alone(capfd):
    watch = Watch(0.3, None)
    watch.start(0, torch.device("cpu"))
    assert watch._process.wait(10) == 0
    watch.stop()
    assert "no run is in progress any more" in capfd.readouterr().err


def test_a_watch_that_dies_does_not_do_so_silently(capfd):
    watch = Watch(60, 60)
    watch.start(0, torch.device("cpu"))
    watch._process.kill()
    watch._thread.join(10)
    assert "the sentry is gone" in capfd.readouterr().err
    watch.stop()
    assert watch_runs.left() == []


def test_where_no_process_can_be_started_the_error_says_so(monkeypatch):
    before = watch_runs.descriptors()
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(ConfigError, match=r"rank 3 can't be started.*/no/python.*=None"):
        Watch(60, 60).start(3, torch.device("cpu"))
    assert watch_runs.left() == []
    assert watch_runs.descriptors() == before


@pytest.mark.parametrize("name", ["hang_timeout", "signal_grace"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "600"])
def test_limits_are_checked(name, value):
    with pytest.raises(ConfigError, match=rf"FastMoEStrategy\({name}={value!r}\).*positive"):
        FastMoEStrategy(**{name: value})


def test_limits_are_those_of_the_strategy():
    assert FastMoEStrategy()._watch._limits == (600, 30)
    assert FastMoEStrategy(hang_timeout=None, signal_grace=7)._watch._limits == (None, 7)


def sentry_of(hang_timeout: float, grace: float, activity: Activity, beat: float) -> Sentry:
    memory = mmap.mmap(-1, sentry.MEMORY_BYTES)
    sentry.PROGRESS.pack_into(memory, 0, beat, 0, 0, activity)
    return Sentry(0, os.getpid(), hang_timeout, grace, 2.0, memory, EXCHANGE, [])


def test_the_grace_does_not_cut_a_save_short_but_the_hang_timeout_does():
    begun = time.monotonic() + 100
    watched = sentry_of(600, 30, Activity.SAVING, begun)
    watched.requests[signal.SIGTERM] = begun
    for now, ended in ((begun + 1, None), (begun + 599, None), (begun + 601, HANG)):
        watched._looked = now
        verdict = watched._verdict(now)
        assert (verdict and verdict[0]) == ended, now - begun


def test_the_grace_begins_anew_with_each_batch():
    begun = time.monotonic() + 100
    watched = sentry_of(600, 30, Activity.TRAINING, begun + 29)
    watched.requests[signal.SIGTERM] = begun
    for now, ended in ((begun + 58, None), (begun + 60, TERMINATED)):
        watched._looked = now
        verdict = watched._verdict(now)
        assert (verdict and verdict[0]) == ended, now - begun


@pytest.mark.parametrize(("activity", "counts"), [("SAVING", True), ("TRAINING", False)])
def test_bytes_written_are_progress_while_a_checkpoint_is_saved(tmp_path, activity, counts):
    begun = time.monotonic() + 100
    watched = sentry_of(600, 30, Activity[activity], begun)
    watched._looked = begun + 599
    watched._verdict(begun + 599)
    (tmp_path / "file").write_bytes(bytes(4 << 20))
    watched._looked = begun + 601
    assert (watched._verdict(begun + 601) is None) == counts


def test_time_in_which_everything_was_stopped_does_not_count():
    begun = time.monotonic() + 100
    watched = sentry_of(600, 30, Activity.TRAINING, begun)
    watched._looked = begun + 5
    assert watched._verdict(begun + 1000) is None, "the sentry has not run in between"
    watched._looked = begun + 1601
    verdict = watched._verdict(begun + 1601)
    assert verdict is not None
    assert verdict[0] == HANG


def test_an_exchange_is_pending_from_its_begin_to_its_end():
    memory = bytearray(8 + EXCHANGE.size)
    pending = PendingExchange(memory, 8)

    def record():
        number, _, is_pending, name = EXCHANGE.unpack_from(memory, 8)
        return number, is_pending, name.rstrip(b"\0").decode()

    with pending("layer 1", "dispatch"):
        assert record() == (1, True, "layer 1, phase dispatch")
    assert record() == (1, False, "layer 1, phase dispatch")
    with pytest.raises(ZeroDivisionError), pending("layer 1", "combine"):
        raise ZeroDivisionError
    assert record() == (2, False, "layer 1, phase combine")


def test_signals_count_that_are_this_ranks_and_had_no_effect():
    watched = sentry_of(600, 30, Activity.TRAINING, time.monotonic())
    own, channel = socket.socketpair()
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    child = os.fork()
    if child == 0:
        own.send(bytes([signal.SIGTERM]))
        os._exit(0)
    os.waitpid(child, 0)
    watched._receive(channel)
    assert watched.requests == {}
    own.send(bytes([signal.SIGTERM]))
    watched._receive(channel)
    assert list(watched.requests) == [signal.SIGTERM]
    own.send(bytes([signal.SIGINT]))
    watched._receive(channel)
    watched.requests[signal.SIGINT] -= 10
    own.send(bytes([signal.SIGINT]))
    watched._receive(channel)
    assert watched.again is None, "the rank has made progress since the first"
    own.send(sentry.STOP)
    assert watched._receive(channel) == {sentry.STOP}
    own.close()
    assert watched._receive(channel) == set()
    channel.close()
