"""Writes checkpoints in a thread while training continues, from copies in host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.save import Snapshot, write
from lightning_fastmoe.distributed.groups import lasting_group
from lightning_fastmoe.errors import CheckpointError

WRITER = "fastmoe-checkpoint"
"""The name of the thread that writes a checkpoint."""


class HostCopies:
    """Host-memory copies of fragments; the buffers are reused by the next save.

    Buffers for CUDA tensors are pinned. Pinning takes far longer than the copy, hence the reuse.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, int], Tensor] = {}

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with copies of its tensors: training may change them afterwards."""
        fragments = [self._copy(fragment) for fragment in snapshot.fragments]
        self._memory = {k: v for k, v in self._memory.items() if k in {_key(f) for f in fragments}}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return Snapshot(fragments, snapshot.small, snapshot.manifest)

    def _copy(self, fragment: OwnedFragment) -> OwnedFragment:
        memory = self._memory.get(_key(fragment))
        parts = list(fragment.parts())
        if memory is None or (memory.numel(), memory.dtype) != (fragment.length, fragment.dtype):
            pinned = any(part.is_cuda for part in parts)
            memory = torch.empty(fragment.length, dtype=fragment.dtype, pin_memory=pinned)
            self._memory[_key(fragment)] = memory
        position = 0
        for part in parts:
            target = memory[position : position + part.numel()]
            target.copy_(part.detach(), non_blocking=True)
            position += part.numel()
        return OwnedFragment.of(fragment.tensor, fragment.shape, fragment.start, memory)


def _key(fragment: OwnedFragment) -> tuple[str, int]:
    return fragment.tensor, fragment.start


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread. All ranks create it, and call it, together.

    It has two gloo groups: one for the threads, and one in which the ranks find out whether all
    threads are done, so that errors surface on all ranks at the same step.
    """

    def __init__(self) -> None:
        self._threads_group = lasting_group("checkpoint threads", backend="gloo")
        self._group = lasting_group("checkpoints", backend="gloo")
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._is_done = threading.Event()
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._afterwards: list[Callable[[], None]] = []

    def submit(self, path: Path, snapshot: Snapshot) -> None:
        """Waits for the previous save, copies the snapshot and starts to write it.

        Raises:
            CheckpointError: on all ranks, if the previous save failed.
        """
        self.wait()
        copy = self._copies.of(snapshot)
        self._path = path
        self._is_done.clear()
        # Not a daemon: the interpreter waits for it before exiting.
        self._thread = threading.Thread(
            target=self._run, args=(path, copy), name=WRITER, daemon=False
        )
        self._thread.start()

    def _run(self, path: Path, snapshot: Snapshot) -> None:
        try:
            write(path, snapshot, self._threads_group)
        except BaseException as error:  # raised in the training thread
            self._error = error
        finally:
            self._is_done.set()

    def is_pending(self, path: Path) -> bool:
        """Whether a save to ``path`` was started and not waited for; identical on every rank."""
        return self._path == path

    def after_success(self, action: Callable[[], None]) -> None:
        """Runs an action once the save in progress is on the disk; never if it fails."""
        if self._thread is None:
            action()
        else:
            self._afterwards.append(action)

    def poll(self) -> None:
        """Raises the error of a save that has ended on all ranks.

        Free unless a save is in progress; then it costs an all-reduce of one number.

        Raises:
            CheckpointError: on all ranks.
        """
        if self._thread is None:
            return
        done = torch.tensor(int(self._is_done.is_set()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._group)
        if done:
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is over.

        Raises:
            CheckpointError: on all ranks, if it failed.
        """
        if self._thread is None:
            return
        # Not Thread.join: one that Ctrl-C interrupts takes the thread for ended (bpo-45274), and
        # then what is to follow the save, such as deleting the checkpoint before, comes too early.
        self._is_done.wait()
        self._thread = self._path = None
        error, self._error = self._error, None
        afterwards, self._afterwards = self._afterwards, []
        if error is not None:
            raise CheckpointError(f"A checkpoint was not written: {error}") from error
        for action in afterwards:
            action()


class ForegroundWriter:
    """Writes each checkpoint at once, with the interface of :class:`BackgroundWriter`."""

    def submit(self, path: Path, snapshot: Snapshot) -> None:
        """Writes a checkpoint."""
        write(path, snapshot)

    def after_success(self, action: Callable[[], Any]) -> None:
        """Runs an action at once."""
        action()

    def poll(self) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""
