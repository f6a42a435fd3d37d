"""Publishes a finished checkpoint atomically: it appears complete or not at all.

``NAME`` is written to ``.NAME.fastmoe-saving-TOKEN`` in the same directory. The token is never
reused, because clients of a network file system may cache for a while what a name meant. Where the
system can exchange two names (local file systems on Linux), the new directory and an older ``NAME``
swap names in one step. Elsewhere (NFS) the older one is first renamed to ``.NAME.fastmoe-old``; if
the machine crashes between the two renames, loading ``NAME`` finds the complete new one, and the
next save renames it to ``NAME``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
import warnings
from pathlib import Path

from lightning_fastmoe.checkpoint.format.discard import check_replaceable, discard
from lightning_fastmoe.checkpoint.format.files import fsync_directory
from lightning_fastmoe.checkpoint.format.manifest import CHECKSUM, MANIFEST
from lightning_fastmoe.errors import CheckpointError

_HIDDEN = re.compile(r"\.(.+)\.fastmoe-(saving-[0-9a-f]{8}|old|removed|lock)", re.DOTALL)
_EXCHANGE = 2
_AT_FDCWD = -100
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def saving_name(path: Path, token: str) -> Path:
    """The hidden directory that a save to ``path`` writes into."""
    return path.with_name(f".{path.name}.fastmoe-saving-{token}")


def _saving(path: Path) -> list[Path]:
    """The hidden directories that unfinished saves to ``path`` have left."""
    if not path.parent.is_dir():
        return []
    beginning = saving_name(path, "").name
    found = [name for name in os.listdir(path.parent) if name.startswith(beginning)]
    return [path.with_name(name) for name in sorted(found) if _HIDDEN.fullmatch(name)]


def _old_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.fastmoe-old")


def _lock_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.fastmoe-lock")


class Publication:
    """One save, on the rank that coordinates it; ends with :meth:`commit` or :meth:`abort`.

    Creating it locks the name (the system releases the lock if the process dies), removes what
    dead saves have left in the same directory, and creates an empty directory to write into.

    Args:
        path: the final path of the checkpoint.

    Attributes:
        token: token from which other ranks get the directory, with :func:`saving_name`.
        directory: directory to write into.

    Raises:
        CheckpointError: if another process is saving to the same name, or if the path has a
            directory that is not a checkpoint and would be deleted.
        OSError: if the directory can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token = secrets.token_hex(4)
        self.directory = saving_name(path, self.token)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock: _Lock | None = _Lock(path)
        try:
            _recover(path)
            _clean_others(path)
            check_replaceable(path)
            self.directory.mkdir()
        except BaseException:
            self._release()
            raise

    def commit(self) -> None:
        """Renames the directory to its final name, then deletes the checkpoint that had it."""
        fsync_directory(self.directory)
        parent = self.path.parent
        if not os.path.lexists(self.path):
            os.rename(self.directory, self.path)
        elif exchange(self.directory, self.path):
            fsync_directory(parent)
            discard(self.directory, self.path, strict=False)
        else:
            old = _old_name(self.path)
            os.rename(self.path, old)
            os.rename(self.directory, self.path)
            fsync_directory(parent)
            discard(old, self.path, strict=False)
        fsync_directory(parent)
        self._release()

    def abort(self) -> None:
        """Deletes what was written; an older checkpoint stays as it was."""
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


def resolve(path: Path) -> Path:
    """The directory of a checkpoint: ``path``, unless a save died between its two renames."""
    if path.exists():
        return path
    old = _old_name(path)
    if not old.is_dir():
        return path
    return next(filter(_is_complete, _saving(path)), old)


def put_back(directory: Path) -> list[str]:
    """Restores the names of checkpoints whose saves died between their two renames.

    Lightning finds the "last" checkpoint by listing names, so it can't see these.

    Args:
        directory: the directory that contains the checkpoints.

    Returns:
        The restored names.
    """
    if not directory.is_dir():
        return []
    found = [m[1] for f in sorted(os.listdir(directory)) if (m := _HIDDEN.fullmatch(f))]
    lost = [n for n in dict.fromkeys(found) if _is_lost(directory / n)]
    for name in lost:
        with contextlib.suppress(CheckpointError):  # the save is still running, and will do it
            lock = _Lock(directory / name)
            try:
                _recover(directory / name)
            finally:
                lock.release()
    return [name for name in lost if (directory / name).exists()]


def _is_lost(path: Path) -> bool:
    return _old_name(path).is_dir() and not os.path.lexists(path)


def remove(path: Path) -> None:
    """Deletes a checkpoint, a file or a link.

    It is renamed to a hidden name first, so that a partly deleted checkpoint is never found. If the
    process dies meanwhile, the next save to the same parent directory deletes the rest. Other files
    in a checkpoint's directory are kept, see
    :func:`~lightning_fastmoe.checkpoint.format.discard.discard`.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    removed = path.with_name(f".{path.name}.fastmoe-removed")
    if removed.exists():
        discard(removed, path)
    os.rename(path, removed)
    discard(removed, path)


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two names atomically; returns False where the system can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _is_complete(directory: Path) -> bool:
    # It is on the disk before anything is renamed, so its existence is enough.
    return (directory / MANIFEST).is_file() and (directory / CHECKSUM).is_file()


def _recover(path: Path) -> None:
    """Finishes or undoes a dead save to ``path``; the caller holds the lock."""
    old = _old_name(path)
    if old.exists() and not path.exists():
        os.rename(next(filter(_is_complete, _saving(path)), old), path)
    for left in _saving(path):
        discard(left, path, unfinished=True)
    for left in (old, path.with_name(f".{path.name}.fastmoe-removed")):
        if os.path.lexists(left):
            discard(left, path)


def _clean_others(path: Path) -> None:
    """Removes what dead saves to other names have left in the same directory."""
    names = {m[1] for f in os.listdir(path.parent) if (m := _HIDDEN.fullmatch(f))}
    for name in sorted(names - {path.name}):
        other = path.with_name(name)
        try:
            lock = _Lock(other)
        except CheckpointError:
            continue  # still running
        try:
            _recover(other)
        finally:
            lock.release()


class _Lock:
    """``flock`` on a file next to the checkpoint; the file's content names the holder."""

    def __init__(self, path: Path) -> None:
        self._file = _lock_name(path)
        self._fd = -1
        while self._fd < 0:
            self._fd = self._try(path)

    def _try(self, path: Path) -> int:
        fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 1000, 0).decode("utf-8", "replace") or "unknown"
            os.close(fd)
            raise CheckpointError(
                f"{path} is being saved by another process right now ({owner}). Give each run"
                " a directory of its own."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise
            warnings.warn(
                f"The file system of {path} does not support locks ({error.strerror}): two runs"
                " that save to"
                " the same name at once won't notice.",
                stacklevel=2,
            )
        try:
            same = os.path.samestat(os.fstat(fd), os.stat(self._file))
        except FileNotFoundError:
            same = False
        if not same:  # its last holder has deleted it meanwhile
            os.close(fd)
            return -1
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now})
        os.ftruncate(fd, 0)
        os.pwrite(fd, owner.encode(), 0)
        return fd

    def release(self) -> None:
        """Deletes the file, then releases the lock, in this order."""
        self._file.unlink(missing_ok=True)
        # Closing is not enough: forked processes (data loader workers) hold a copy.
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
