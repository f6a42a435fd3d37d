"""Low-level file access: opening without following links, writing with fsync."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import stat
from pathlib import Path

from lightning_fastmoe.errors import CheckpointError

FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\.(safetensors|json|pt|sha256)")
"""Pattern of all file names in a checkpoint; no match can lead out of the directory."""

BUFFER_BYTES = 4 * 2**20
"""Size of the host buffers that data passes through."""

_SYNC_FILE_RANGE_WRITE = 2


def open_directory(path: Path) -> int:
    """Opens a directory. The descriptor stays valid if another directory takes over the name.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist. Choose another checkpoint; in a run on several machines, check"
            " that all of them see the same file system."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be opened as a directory: {error.strerror}. A checkpoint of"
            " FastMoEStrategy is a directory."
        ) from error


def open_regular(directory: int, name: str, where: Path) -> tuple[int, int]:
    """Opens a regular file for reading, never through a link.

    Args:
        directory: descriptor of the directory.
        name: the name of the file.
        where: path of the directory, for messages.

    Returns:
        (descriptor, size in bytes)

    Raises:
        CheckpointError: if it is missing, unreadable, a link or anything but a regular file.
    """
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where}: {name!r} is not a checkpoint file name ({FILE_NAME.pattern}). The"
            " manifest was not written by this package: don't load it."
        )
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        raise CheckpointError(
            f"{where / name} is missing: the checkpoint is incomplete, or was replaced while it was"
            " being read. Choose another one."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{where / name} can't be opened: {error.strerror}. Links are not followed."
        ) from error
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        os.close(fd)
        raise CheckpointError(f"{where / name} is not a regular file: don't load this checkpoint.")
    return fd, about.st_size


def read_exactly(fd: int, view: memoryview, offset: int, where: Path) -> None:
    """Fills ``view`` with the bytes from ``offset`` on.

    Raises:
        CheckpointError: if the file is too short or can't be read.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"{where} can't be read at byte {offset + done}: {error.strerror}."
            ) from error
        if count == 0:
            raise CheckpointError(f"{where} ends at byte {offset + done}: it was cut short.")
        done += count


def read_small(directory: int, name: str, where: Path, limit: int) -> bytes:
    """Reads a whole file of at most ``limit`` bytes.

    Raises:
        CheckpointError: as :func:`open_regular`, or if it is larger.
    """
    fd, size = open_regular(directory, name, where)
    try:
        if size > limit:
            raise CheckpointError(
                f"{where / name} has {size} bytes; this package writes at most {limit}."
            )
        data = bytearray(size)
        read_exactly(fd, memoryview(data), 0, where / name)
    finally:
        os.close(fd)
    return bytes(data)


def create(path: Path) -> int:
    """Creates a file, which must not exist, and returns its descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o644)


def write_all(fd: int, view: memoryview) -> None:
    """Writes all of ``view``."""
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Tells the kernel to start flushing the given bytes to the disk, without waiting.

    Otherwise it would start seconds later, or at fsync: the disk would idle first and the CPU
    afterwards. This is only a hint; :func:`os.fsync` still reports every error.
    """
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if sync_file_range is not None:  # Linux
        sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def write_small(path: Path, data: bytes) -> tuple[int, str]:
    """Writes a new file and waits until it is on the disk.

    Returns:
        (size in bytes, SHA-256)
    """
    fd = create(path)
    try:
        write_all(fd, memoryview(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    return len(data), hashlib.sha256(data).hexdigest()


def fsync_directory(path: Path) -> None:
    """Waits until the directory's entries are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems don't support it; they order renames on their own.
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
