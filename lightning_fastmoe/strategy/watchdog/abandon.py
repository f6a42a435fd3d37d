"""Abandons collectives of NCCL that other ranks never join, so that an error can end the run.

An error on one rank, or a layer that one rank skips, can leave a collective on the device that
never completes. The end of a run copies weights and optimizer states to the host, after everything
that was enqueued before: the error would never reach the user.
"""

from __future__ import annotations

import os
import threading
import traceback
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from lightning_fastmoe.checkpoint.background import WRITER
from lightning_fastmoe.strategy.watchdog.sentry import HANG_STATUS

_DONE = 30.0
"""Seconds within which a device whose collectives are complete has done the rest, which may be a
long backward pass. NCCL's own watchdog ends a process 60 s after it has lost another one."""


class AbandonedCollectivesWarning(RuntimeWarning):
    """Collectives that other ranks never joined were aborted; process groups are unusable."""


def abandon_collectives(exception: BaseException, seconds: float = _DONE) -> bool:
    """Waits until the current device has done all work; if it doesn't, aborts NCCL's communicators.

    Called when an exception has ended the run, before anything is copied to the host. If the device
    is still blocked afterwards, nothing can free it: the process ends, and says why.

    Args:
        exception: what ended the run.
        seconds: the time to wait before, and after, communicators are aborted.

    Returns:
        Whether they were aborted. New process groups are needed then.
    """
    if not (torch.cuda.is_initialized() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    device = torch.cuda.current_device()  # threads have their own
    is_done = _aside(lambda: torch.cuda.synchronize(device))
    if is_done(seconds):
        return False
    rank = dist.get_rank()
    warnings.warn(
        f"rank {rank}: the device still waits for other ranks {seconds:g} s after the run has ended"
        " with an error. Their collectives are abandoned; another run needs a new process.",
        AbandonedCollectivesWarning,
        stacklevel=2,
    )
    # All at once: to abort one frees memory, which waits for the kernels of the others.
    for group in _nccl_groups():
        _aside(group.abort)
    if not is_done(seconds):
        text = "".join(traceback.format_exception(exception))
        end = (
            f"\n{text}\nlightning_fastmoe, rank {rank}: the device is still blocked. This process"
            f" ends with status {HANG_STATUS}.\n"
        )
        os.write(2, end.encode())
        for thread in threading.enumerate():
            if thread.name == WRITER:  # of a checkpoint
                thread.join()
        os._exit(HANG_STATUS)
    return True


def _aside(function: Callable[[], object]) -> Callable[[float], bool]:
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


def _nccl_groups() -> list[dist.ProcessGroup]:
    return [group for group in list(dist.distributed_c10d._world.pg_map) if _has_nccl(group)]


def _has_nccl(group: dist.ProcessGroup) -> bool:
    try:
        return bool(group._get_backend(torch.device("cuda")).name() == "nccl")
    except RuntimeError:  # it has no backend for CUDA
        return False
