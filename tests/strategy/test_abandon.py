"""Collectives that never end are aborted when an error has ended the run, and only then."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from lightning_fastmoe.strategy.watchdog import abandon


class Backend:
    """One of NCCL's, or gloo's."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.kind, self.calls = name, calls

    def name(self) -> str:
        return self.kind

    def _group_start(self) -> None:
        self.calls.append("start")

    def _group_end(self) -> None:
        self.calls.append("end")


class Group:
    """A process group with a single backend, for CUDA tensors unless there is none."""

    def __init__(self, name: str, backend: Backend | None, end: threading.Event) -> None:
        self.name, self.backend, self.end = name, backend, end

    def _get_backend(self, device: torch.device) -> Backend:
        assert device.type == "cuda"
        if self.backend is None:
            raise RuntimeError("no backend for CUDA")
        return self.backend

    def abort(self) -> None:
        assert self.backend is not None
        assert self.backend.kind == "nccl"
        self.backend.calls.append(self.name)
        self.end.set()


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks with a device; returns the calls, and the event that the device waits for."""
    calls, end = [], threading.Event()
    kinds = {"world": "nccl", "host": None, "both": "gloo", "experts": "nccl"}
    groups = [
        Group(name, kind and Backend(kind, calls), end)  # type: ignore[arg-type]
        for name, kind in kinds.items()
    ]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(
        type(dist.distributed_c10d._world), "pg_map", property(lambda _: dict.fromkeys(groups))
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: end.wait(20) and None)
    return calls, end


def test_a_blocked_device_is_freed(ranks):
    calls, _ = ranks
    with pytest.warns(abandon.AbandonedCollectivesWarning, match=r"rank 1: .* 0.2 s after"):
        assert abandon.abandon_collectives(0.2)
    assert calls == ["start", "experts", "world", "end"]


def test_a_device_that_gets_done_keeps_its_groups(ranks):
    calls, end = ranks
    threading.Timer(0.2, end.set).start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not abandon.abandon_collectives(10.0)
    assert calls == []


def test_a_device_with_an_error_is_left_to_the_main_thread(ranks, monkeypatch):
    def fail(device: int) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not abandon.abandon_collectives(10.0)
    assert ranks[0] == []


@pytest.mark.parametrize("missing", ["device", "ranks", "other ranks"])
def test_nothing_is_waited_for_without_others(ranks, monkeypatch, missing):
    if missing == "device":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    elif missing == "ranks":
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
    else:
        monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    begin = time.monotonic()
    assert not abandon.abandon_collectives(5.0)
    assert time.monotonic() - begin < 2
    assert ranks[0] == []
