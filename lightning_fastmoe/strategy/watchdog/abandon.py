"""Abandons collectives of NCCL that other ranks never join, so that an error can end the run.

An error on one rank, or layers that one rank leaves out, can leave a collective on the device that
waits for ever. The end of a run copies weights and optimizer states to the host, after everything
that was enqueued before: the error would never reach the user.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_DONE = 10.0
"""Seconds within which a device whose collectives are complete has done the rest."""


class AbandonedCollectivesWarning(RuntimeWarning):
    """Collectives that other ranks never joined were aborted; process groups are unusable."""


def abandon_collectives(seconds: float = _DONE) -> bool:
    """Waits until the current device has done all work; if it doesn't, aborts NCCL's communicators.

    Called when an exception has ended the run, before anything is copied to the host.

    Args:
        seconds: the time to wait before, and after, communicators are aborted.

    Returns:
        Whether they were aborted. New process groups are needed then.
    """
    if not (torch.cuda.is_initialized() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    device = torch.cuda.current_device()  # threads have their own
    is_done = _wait_aside(lambda: torch.cuda.synchronize(device))
    if is_done(seconds):
        return False
    warnings.warn(
        f"rank {dist.get_rank()}: the device still waits for other ranks {seconds:g} s after the"
        " run has ended with an error. Their collectives are abandoned; another run needs a new"
        " process.",
        AbandonedCollectivesWarning,
        stacklevel=2,
    )
    # Also aside: an abort waits for the communicator's own threads.
    _wait_aside(_abort)(seconds)
    is_done(seconds)
    return True


def _wait_aside(function: Callable[[], None]) -> Callable[[float], bool]:
    """Calls a function in a thread; returns one that waits for it and says whether it is done."""
    done = threading.Event()

    def call() -> None:
        try:
            function()
        except RuntimeError:  # CUDA's or NCCL's, which the main thread meets as well
            pass
        finally:
            done.set()

    threading.Thread(target=call, name="fastmoe-abandon", daemon=True).start()
    return done.wait


def _abort() -> None:
    """Ends the kernels of all NCCL communicators of this rank."""
    groups = [
        (group, backend)
        for group in list(dist.distributed_c10d._world.pg_map)
        if (backend := _nccl_backend(group)) is not None
    ]
    if not groups:
        return
    # Between start and end, as in torch's own _abort_process_group: aborted one after the other,
    # communicators can wait for each other (pytorch#119797).
    first = groups[0][1]
    first._group_start()
    for group, _ in reversed(groups):
        group.abort()
    first._group_end()


def _nccl_backend(group: dist.ProcessGroup) -> Any:
    """A group's NCCL backend, or None."""
    try:
        backend: Any = group._get_backend(torch.device("cuda"))
    except RuntimeError:
        return None
    return backend if backend.name() == "nccl" else None
