"""Collectives that never end are aborted when an error has ended the run, and only then."""

from __future__ import annotations

import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_fastmoe.checkpoint.background import WRITER
from lightning_fastmoe.strategy.watchdog import abandon
from lightning_fastmoe.strategy.watchdog.exchange_waits import ExchangeWaits

ERROR = ValueError("the disk is full")


class Device:
    """What two communicators' kernels block until both are aborted."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.free = threading.Event()
        self._all = threading.Barrier(2, action=self.free.set)

    def abort(self, name: str) -> None:
        """Frees memory, which waits for the kernels of the other communicator."""
        self.aborted.append(name)
        self._all.wait(20)


class Group:
    """A process group with a single backend, for CUDA tensors unless it is None."""

    def __init__(self, name: str, backend: str | None, device: Device) -> None:
        self.name, self.backend, self.device = name, backend, device

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        assert device.type == "cuda"
        if self.backend is None:
            raise RuntimeError("no backend for CUDA")
        return SimpleNamespace(name=lambda: self.backend)

    def abort(self) -> None:
        assert self.backend == "nccl"
        self.device.abort(self.name)


@pytest.fixture
def device(monkeypatch):
    """That of one of two ranks."""
    device = Device()
    kinds = {"world": "nccl", "host": None, "both": "gloo", "experts": "nccl"}
    groups = {Group(name, kind, device): None for name, kind in kinds.items()}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(type(dist.distributed_c10d._world), "pg_map", property(lambda _: groups))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: device.free.wait(20) and None)
    return device


def test_a_blocked_device_is_freed(device):
    """Communicators are aborted at the same time, since one waits for the other."""
    with pytest.warns(abandon.AbandonedCollectivesWarning, match=r"rank 1: .* 0.5 s after"):
        assert abandon.abandon_collectives(ERROR, 0.5)
    assert sorted(device.aborted) == ["experts", "world"]


def test_the_process_ends_if_nothing_frees_the_device(device, monkeypatch, capfd):
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    written: list[str] = []
    writer = threading.Thread(
        target=lambda: time.sleep(1.0) or written.append("checkpoint"), name=WRITER
    )
    writer.start()
    idle = ThreadPoolExecutor(1)  # the user's: nobody waits for it
    idle.submit(int).result()
    monkeypatch.setattr(Group, "abort", lambda group: None)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.warns(abandon.AbandonedCollectivesWarning), pytest.raises(Ended, match="75"):
        abandon.abandon_collectives(ERROR, 0.2)
    device.free.set()
    idle.shutdown()
    assert written == ["checkpoint"]
    said = capfd.readouterr().err
    assert "ValueError: the disk is full" in said
    assert "rank 1: the device is still blocked. This process ends with status 75" in said


def test_a_device_that_gets_done_keeps_its_groups(device):
    threading.Timer(0.2, device.free.set).start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not abandon.abandon_collectives(ERROR, 10.0)
    assert device.aborted == []


def test_a_device_with_an_error_is_left_to_the_main_thread(device, monkeypatch):
    def fail(index: int) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not abandon.abandon_collectives(ERROR, 10.0)
    assert device.aborted == []


@pytest.mark.parametrize("missing", ["device", "ranks", "other ranks"])
def test_nothing_is_waited_for_without_others(device, monkeypatch, missing):
    if missing == "device":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    elif missing == "ranks":
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
    else:
        monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    begin = time.monotonic()
    assert not abandon.abandon_collectives(ERROR, 5.0)
    assert time.monotonic() - begin < 2
    assert device.aborted == []


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
