"""Ctrl-C is for the process that trains, not for the workers of its loaders."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader


def leave_interrupts_to_ranks(loader: Any) -> Any:
    """Has a loader's workers ignore SIGINT, and returns the loader.

    A terminal sends it to all processes of its foreground group. Workers would end at once, and the
    batch that their rank still needs, to end together with the others, would be an error.

    Args:
        loader: any iterable; workers that it has already are left alone.
    """
    if isinstance(loader, DataLoader) and loader.num_workers > 0:
        begin = loader.worker_init_fn
        if not isinstance(begin, WithoutInterrupts):
            loader.worker_init_fn = WithoutInterrupts(begin)
    return loader


class WithoutInterrupts:
    """A ``worker_init_fn`` that ignores SIGINT first.

    Args:
        begin: what else a worker does when it begins, or None.
    """

    def __init__(self, begin: Callable[[int], None] | None) -> None:
        self._begin = begin

    def __call__(self, worker: int) -> None:
        """Prepares worker number ``worker``."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._begin is not None:
            self._begin(worker)
