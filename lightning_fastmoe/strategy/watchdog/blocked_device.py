"""Ends a run whose device waits for other ranks, so that its error reaches the user.

An error on one rank, or a layer that one rank skips, can leave a collective on the device that
never completes. The end of a run copies weights and optimizer states to the host, after everything
that was enqueued before: the error would never be seen. Aborting NCCL's communicators is no way
out, as it can itself wait for the device (NVIDIA/nccl#829, #1777), and nothing could train on.
"""

from __future__ import annotations

import os
import threading
import traceback

import torch
import torch.distributed as dist

from lightning_fastmoe.checkpoint.background import WRITER
from lightning_fastmoe.strategy.watchdog.sentry import HANG_STATUS

_DONE = 30.0
"""Seconds within which a device whose collectives are complete has done the rest, which may be a
long backward pass. NCCL's own watchdog ends a process 60 s after it has lost another one."""


def end_if_blocked(exception: BaseException, seconds: float = _DONE) -> None:
    """Waits until the current device has done all work; if it doesn't, ends the process.

    Called when an exception has ended the run, before anything is copied to the host. The process
    prints the exception, waits for a checkpoint that is being written, and ends with status 75.

    Args:
        exception: what ended the run.
        seconds: the time to wait.
    """
    if not (torch.cuda.is_initialized() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if _is_done(torch.cuda.current_device(), seconds):
        return
    text = "".join(traceback.format_exception(exception))
    end = (
        f"\n{text}\nlightning_fastmoe, rank {dist.get_rank()}: {seconds:g} s after this error, the"
        f" device still waits for other ranks. This process ends with status {HANG_STATUS}.\n"
    )
    os.write(2, end.encode())
    for thread in threading.enumerate():
        if thread.name == WRITER:  # of a checkpoint
            thread.join()
    os._exit(HANG_STATUS)


def _is_done(device: int, seconds: float) -> bool:
    done = threading.Event()

    def wait() -> None:
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:  # CUDA's, which the main thread meets as well
            pass
        finally:
            done.set()

    threading.Thread(target=wait, name="fastmoe-device", daemon=True).start()
    return done.wait(seconds)
