"""Copies through buffers: the same bytes, and no buffer is written before it has been read."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_fastmoe.inference.pinned as pinned
from lightning_fastmoe.inference.bounce import BounceBuffers

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0, 1, 500, 501, 1000, 2499])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float32])
def test_bytes(size: int, dtype: torch.dtype) -> None:
    bounce = BounceBuffers(CPU, piece=1000)
    host = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    into = torch.zeros_like(host)
    for _ in range(2):  # the second begins with the buffer after the first one's last
        bounce.copy(into, host)
        assert torch.equal(into.view(torch.uint8), host.view(torch.uint8))
        into.zero_()


def test_a_buffer_is_written_once_its_copy_is_done() -> None:
    bounce = BounceBuffers(CPU, piece=8)
    seen: list[tuple[str, int]] = []
    bounce._emptied = [
        SimpleNamespace(
            synchronize=lambda n=n: seen.append(("waits", n)),
            record=lambda n=n: seen.append(("records", n)),
        )
        for n in range(2)
    ]
    bounce.copy(torch.zeros(20, dtype=torch.uint8), torch.ones(20, dtype=torch.uint8))
    bounce.copy(torch.zeros(3, dtype=torch.uint8), torch.ones(3, dtype=torch.uint8))
    assert seen == [(what, n) for n in (0, 1, 0, 1) for what in ("waits", "records")]


def refuse(monkeypatch: pytest.MonkeyPatch, which: list[int]) -> None:
    """cudaHostRegister refuses the calls of those numbers; buffers are on the CPU."""
    calls = iter(range(100))
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *_: 2 if next(calls) in which else 0,
        cudaHostUnregister=lambda _: None,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: zeros(1))
    monkeypatch.setattr(pinned, "BounceBuffers", lambda _: BounceBuffers(CPU))


def test_what_is_not_registered_takes_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, [1, 3])
    memory = torch.randn(5, 1 << 19)
    with pytest.warns(UserWarning, match=r"0.0 GB of experts .* through pinned buffers"):
        held = pinned.PinnedMemory(list(memory)[::-1])
    assert held.refused == 4 << 20
    bounced: list[int] = []
    copy = BounceBuffers.copy

    def counted(self: Any, into: torch.Tensor, host: torch.Tensor) -> None:
        bounced.append(host.numel())
        copy(self, into, host)

    monkeypatch.setattr(BounceBuffers, "copy", counted)
    rows = [memory[0], memory[2], memory[4], memory[1], memory[1][-7:], memory[3][:7]]
    rows += [memory[:2], memory[2:], memory[3:], memory]
    for host in rows:
        into = torch.zeros_like(host)
        held.copy(into, host)
        assert torch.equal(into, host)
    assert bounced == [host.numel() for host in rows[3:]]
    held.close()


@pytest.mark.parametrize("bounces", [True, False])
def test_without_buffers_the_driver_copies(bounces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no pinned memory either, and where the host must not read by itself."""
    refuse(monkeypatch, [0])
    asked: list[torch.device] = []

    def fail(device: torch.device) -> None:
        asked.append(device)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pinned, "BounceBuffers", fail)
    memory = torch.randn(1 << 19)
    with pytest.warns(UserWarning, match="They are copied at a fraction of the rate"):
        held = pinned.PinnedMemory([memory], bounces=bounces)
    with warnings.catch_warnings(action="error"):
        refuse(monkeypatch, [0])
        pinned.PinnedMemory([memory], None, bounces=False).close()
    monkeypatch.setattr(pinned, "BounceBuffers", fail)
    assert len(asked) == bounces
    into = torch.zeros_like(memory)
    held.copy(into, memory)
    assert torch.equal(into, memory)
