"""A process whose device waits for other ranks after an error says so and ends; others go on."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_fastmoe.checkpoint.background import WRITER
from lightning_fastmoe.strategy.watchdog.blocked_device import end_if_blocked
from lightning_fastmoe.strategy.watchdog.exchange_waits import ExchangeWaits

ERROR = ValueError("the disk is full")


class Ended(BaseException):
    """The process would have ended with this status."""


@pytest.fixture
def device(monkeypatch):
    """That of one of two ranks, which is blocked until this event is set."""
    free = threading.Event()

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: free.wait(20) and None)
    monkeypatch.setattr(os, "_exit", end)
    yield free
    free.set()


def test_a_process_whose_device_is_blocked_ends(device, capfd):
    """A checkpoint that is being written is finished; idle threads of the user are not awaited."""
    written: list[str] = []
    writer = threading.Thread(
        target=lambda: time.sleep(1.0) or written.append("checkpoint"), name=WRITER
    )
    writer.start()
    idle = ThreadPoolExecutor(1)
    idle.submit(int).result()
    with pytest.raises(Ended, match="75"):
        end_if_blocked(ERROR, 0.2)
    idle.shutdown()
    assert written == ["checkpoint"]
    said = capfd.readouterr().err
    assert "ValueError: the disk is full" in said
    assert "rank 1: 0.2 s after this error, the device still waits for other ranks" in said
    assert "This process ends with status 75" in said


def test_a_device_that_gets_done_is_waited_for(device, capfd):
    threading.Timer(0.3, device.set).start()
    begin = time.monotonic()
    end_if_blocked(ERROR, 10.0)
    assert 0.2 < time.monotonic() - begin < 5
    assert capfd.readouterr().err == ""


def test_a_device_with_an_error_is_left_to_the_main_thread(device, monkeypatch):
    def fail(index: int) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    end_if_blocked(ERROR, 10.0)


@pytest.mark.parametrize("missing", ["device", "ranks", "other ranks"])
def test_nothing_is_waited_for_without_others(device, monkeypatch, missing):
    if missing == "device":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    elif missing == "ranks":
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
    else:
        monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    begin = time.monotonic()
    end_if_blocked(ERROR, 5.0)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("error", "tells"), [(ERROR, True), (KeyboardInterrupt(), True), (SIGTERMException(), False)]
)
def test_kernels_of_other_ranks_are_told(error, tells):
    """Whatever ends this rank alone; SIGTERM ends all of them between the same two batches."""
    waits, calls = ExchangeWaits(None, None), []
    waits._peers = SimpleNamespace(rank=0, leave=lambda reason: None)
    waits._sharder = SimpleNamespace(give_up=lambda: calls.append("told"))
    waits.leave(error)
    assert calls == ["told"] * tells
