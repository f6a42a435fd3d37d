"""Memory of each rank of a group that all its ranks can write to.

The one file that knows torch's symmetric memory, whose interface is young.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.ops import native
from lightning_fastmoe.ops.exchange import MAX_RANKS

ADVICE = "Use dispatcher='dedup', which needs no more than NCCL."


class SymmetricMemory:
    """The same number of bytes on each rank, mapped into each of their processes.

    On GPUs it is torch's symmetric memory, without multicast; on the CPU it is shared memory.

    Args:
        group: the ranks; all of them call this at the same point.
        size: the number of bytes.
        device: where.

    Attributes:
        ranks: (size,) uint8, the memory of each rank; not initialised.
        own: this rank's.

    Raises:
        TopologyError: on all ranks, if it doesn't work on any of them.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        self._handle: Any = None
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        self.ranks: list[Tensor] = []
        with torch.inference_mode(False):  # a validation may be the first to need it
            if world == 1:
                self.ranks.append(torch.empty(size, dtype=torch.uint8, device=device))
            elif device.type == "cuda":
                agree(group, lambda: self._map_cuda(group, size, device))
            else:
                self._map_files(group, size)
        self.own = self.ranks[rank]

    def _map_cuda(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        own = symmetric.empty(size, dtype=torch.uint8, device=device)
        handle = self._handle = symmetric.rendezvous(own, group)
        self.ranks = [
            own if rank == handle.rank else handle.get_buffer(rank, (size,), torch.uint8)
            for rank in range(handle.world_size)
        ]

    def _map_files(self, group: dist.ProcessGroup, size: int) -> None:
        shared = Path("/dev/shm")  # noqa: S108  in memory, where there is one
        path = ""

        def make() -> None:
            nonlocal path
            folder = shared if os.access(shared, os.W_OK) else None
            file, path = tempfile.mkstemp(prefix="lightning_fastmoe_", dir=folder)
            try:
                os.posix_fallocate(file, 0, size)  # an error now, not a signal at the first write
            finally:
                os.close(file)

        def open_all() -> None:
            self.ranks = [
                torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in paths
            ]

        try:
            agree(group, make)
            paths: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(paths, path, group=group)
            agree(group, open_all)
        finally:
            if path:
                Path(path).unlink(missing_ok=True)


def agree(group: dist.ProcessGroup, work: Callable[[], None]) -> None:
    """Runs ``work`` on all ranks, and fails on all of them if it does on one.

    Raises:
        TopologyError: with the reasons.
    """
    reason = None
    try:
        work()
    except (RuntimeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
    refuse_unless_all_can(group, reason)


def refuse_unless_all_can(group: dist.ProcessGroup, reason: str | None) -> None:
    """Raises on all ranks if one has a reason.

    Args:
        group: the ranks; all of them call this.
        reason: why this one can't, or None.

    Raises:
        TopologyError: with the first reason.
    """
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    found = [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None]
    if found:
        raise TopologyError(
            f"dispatcher='symmetric' can't reach the memory of all {len(reasons)} ranks of the"
            f" expert parallel group ({found[0]}). {ADVICE}"
        )


def check_reachable(group: dist.ProcessGroup, device: torch.device) -> None:
    """Checks, before anything is mapped, what can be known; all ranks call this.

    Raises:
        TopologyError: on all ranks, naming the first reason.
    """
    world = dist.get_world_size(group)
    own = (_host(), _gpu(device.index) if device.type == "cuda" else "")
    places: list[Any] = [None] * world
    dist.all_gather_object(places, own, group=group)
    hosts, gpus = zip(*places, strict=True)
    reason = None
    if len(set(hosts)) > 1:
        reason = f"the group spans {len(set(hosts))} hosts"
    elif world > MAX_RANKS:
        reason = f"there are more than {MAX_RANKS}"
    elif device.type == "cuda":
        reason = _why_not_cuda(device, gpus)
    elif platform.machine() not in ("x86_64", "AMD64"):
        reason = f"on the CPU it relies on the order in which x86 stores, not {platform.machine()}"
    refuse_unless_all_can(group, reason)


def _host() -> str:
    """What only processes on this host say."""
    name = os.uname().nodename
    with suppress(OSError):
        name += Path("/proc/sys/kernel/random/boot_id").read_text()
    return name


def _gpu(index: int) -> str:
    """What all processes call this GPU, whichever they can see."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _why_not_cuda(device: torch.device, gpus: Sequence[str]) -> str | None:
    """Why kernels on ``device`` can't write to the memory of ``gpus``; None if nothing is known."""
    if native.load() is None:
        return f"the CUDA kernels are unavailable: {native.unavailable_reason()}"
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        # A wait could stand before NCCL's kernel in the only queue of one rank, and after it in
        # another's.
        return "CUDA_DEVICE_MAX_CONNECTIONS=1 leaves one queue for waits and collectives"
    # Only of those that this process can see; for others, mapping shows.
    for other in range(torch.cuda.device_count()):
        is_peer = other != device.index and _gpu(other) in gpus
        if is_peer and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device.index} has no access to the memory of GPU {other}"
    if os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1") != "1":
        return "multicast is on (TORCH_SYMM_MEM_DISABLE_MULTICAST), which has not been tested"
    import torch.distributed._symmetric_memory as symmetric

    backend = symmetric.get_backend(device)
    if backend != "CUDA":
        return f"the symmetric memory of torch is set to {backend}, not to CUDA"
    return None
