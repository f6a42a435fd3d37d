"""Compares a file with its hash, and finds the first tensor that differs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_fastmoe.checkpoint.format.files import BUFFER_BYTES, read_exactly
from lightning_fastmoe.errors import CheckpointError


@dataclass(frozen=True, order=True)
class Mark:
    """Expected hash of the first ``end`` bytes of a file.

    Attributes:
        end: number of bytes.
        digest: first hexadecimal digits of the SHA-256 of these bytes.
        what: description of the data that ends there, for messages.
    """

    end: int
    digest: str
    what: str


def check_hash(
    fd: int,
    where: Path,
    expected: str,
    marks: Iterable[Mark],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Reads a file once and compares its hash, at each mark and at the end.

    Args:
        fd: the file.
        where: its path, for messages.
        expected: SHA-256 of all bytes, in hexadecimal.
        marks: positions at which the hash is compared too.
        on_bytes: called with the number of bytes after each read.

    Raises:
        CheckpointError: if the hash differs, naming the first mark at which it does.
    """
    size = os.fstat(fd).st_size
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(BUFFER_BYTES, size)))
    left = iter([*sorted(marks), Mark(size, "", "all of it")])
    mark = next(left)
    for begin in range(0, size, BUFFER_BYTES):
        end = min(begin + BUFFER_BYTES, size)
        view = buffer[: end - begin]
        read_exactly(fd, view, begin, where)
        position = begin
        while position < end:
            stop = min(mark.end, end)
            digest.update(view[position - begin : stop - begin])
            position = stop
            if position == mark.end < size:
                if not digest.copy().hexdigest().startswith(mark.digest):
                    raise damaged(where, mark.what)
                mark = next(left)
        if on_bytes is not None:
            on_bytes(end - begin)
    if digest.hexdigest() != expected:
        raise damaged(where, mark.what)
    if not expected.startswith(mark.digest):  # the last fragment ends with the file
        raise CheckpointError(
            f"{where}: the manifest is inconsistent: the digest of {mark.what} is"
            f" {mark.digest!r}, which does not begin the file's SHA-256."
        )


def damaged(where: Path, what: str) -> CheckpointError:
    """The error about a file whose hash differs."""
    return CheckpointError(
        f"{where} is damaged: its SHA-256 differs from the manifest's ({what}). Choose another"
        " checkpoint."
    )
