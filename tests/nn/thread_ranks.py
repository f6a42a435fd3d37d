"""Ranks as threads of one process: what a global batch needs, without process groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Shared:
    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)


class ThreadBatch:
    """A global batch over threads."""

    def __init__(self, shared: _Shared, rank: int, num_expert_ranks: int = 1) -> None:
        self._shared, self.rank, self.size = shared, rank, len(shared.slots)
        self.num_expert_ranks = num_expert_ranks

    def _gather(self, value: Tensor) -> list[Tensor]:
        self._shared.slots[self.rank] = value
        self._shared.barrier.wait()
        found = list(self._shared.slots)
        self._shared.barrier.wait()
        return found

    def gather_counts(self, counts: Tensor, layer: str) -> Tensor:
        assert counts.dtype == torch.int64
        assert bool((counts >= 0).all())
        return torch.stack(self._gather(counts))

    def gather_rows(self, rows: Tensor, layer: str) -> tuple[Tensor, int]:
        parts = self._gather(rows)
        return torch.cat(parts), sum(len(p) for p in parts[: self.rank])

    def near_experts(self, num_experts: int) -> Tensor:
        return torch.ones(num_experts, dtype=torch.bool)


def on_ranks(function: Callable[[int, ThreadBatch], Any], size: int) -> list[Any]:
    """``function(rank, batch)`` in ``size`` threads; what each returned."""
    shared = _Shared(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank, ThreadBatch(shared, rank))
        except BaseException as error:  # noqa: BLE001  raised again below
            errors.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        first = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        raise (first or errors)[0]
    return results
