"""Opens and verifies the files of a checkpoint directory against its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lightning_fastmoe.checkpoint.format import files
from lightning_fastmoe.checkpoint.format.fragment import StoredFragment
from lightning_fastmoe.checkpoint.format.hashing import Mark, check_hash
from lightning_fastmoe.checkpoint.format.manifest import (
    CHECKSUM,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
)
from lightning_fastmoe.checkpoint.format.records import FileRecord
from lightning_fastmoe.checkpoint.format.shards import read_header
from lightning_fastmoe.checkpoint.format.tensor_names import fragment_key
from lightning_fastmoe.errors import CheckpointError

_SHOWN = 4

Fragments = Sequence[tuple[str, str, StoredFragment]]
"""(tensor, dtype, fragment) of every fragment in a file."""


def read_manifest(directory: int, path: Path) -> bytes:
    """Reads the manifest's bytes.

    Args:
        directory: file descriptor of the checkpoint directory.
        path: the path of the checkpoint, for messages.

    Raises:
        CheckpointError: if there is none.
    """
    return files.read_small(directory, MANIFEST, path, MAX_MANIFEST_BYTES)


def check_checksum(directory: int, path: Path, data: bytes) -> str:
    """Returns the manifest's SHA-256, after comparing it with ``manifest.sha256``.

    Raises:
        CheckpointError: if it differs.
    """
    line = files.read_small(directory, CHECKSUM, path, 1000)
    checksum = hashlib.sha256(data).hexdigest()
    if line != checksum_line(checksum):
        raise CheckpointError(
            f"{path / MANIFEST} does not match {CHECKSUM}: one of them is damaged. Choose another"
            " checkpoint."
        )
    return checksum


def checksum_line(sha256: str) -> bytes:
    """The content of ``manifest.sha256``, as ``sha256sum`` writes it."""
    return f"{sha256}  {MANIFEST}\n".encode()


def fragments_by_file(manifest: Manifest) -> dict[str, list[tuple[str, str, StoredFragment]]]:
    """File name -> (tensor, dtype, fragment) of every fragment in it."""
    result: dict[str, list[tuple[str, str, StoredFragment]]] = {}
    for name, record in manifest.tensors.items():
        for fragment in record.fragments:
            result.setdefault(fragment.file, []).append((name, record.dtype, fragment))
    return result


def open_listed(
    directory: int, path: Path, name: str, record: FileRecord, fragments: Fragments
) -> tuple[int, int]:
    """Opens a file that the manifest lists, and checks its size.

    Returns:
        (descriptor, size in bytes)

    Raises:
        CheckpointError: naming the file and the tensors in it.
    """
    try:
        fd, size = files.open_regular(directory, name, path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_tensors(fragments)}") from error
    if size != record.size:
        os.close(fd)
        raise CheckpointError(
            f"{path / name} has {size} bytes, the manifest says {record.size}: it was cut short"
            f" or replaced.{_tensors(fragments)}"
        )
    return fd, size


def verify_file(
    directory: int,
    path: Path,
    name: str,
    record: FileRecord,
    fragments: Fragments,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Reads a whole file and compares its size, header and hashes with the manifest.

    Raises:
        CheckpointError: naming the file and the first damaged tensor.
    """
    where = path / name
    fd, size = open_listed(directory, path, name, record, fragments)
    try:
        marks = []
        if name.endswith(".safetensors"):
            header = read_header(fd, size, fragments, where)
            for tensor, _, fragment in fragments:
                end = header[fragment_key(tensor, fragment)].end
                what = f"tensor {tensor!r}, elements {fragment.start} to {fragment.stop}"
                marks.append(Mark(end, fragment.digest, what))
        check_hash(fd, where, record.sha256, marks, on_bytes)
    finally:
        os.close(fd)


def strangers(directory: int, path: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(name, error message) of each file that the manifest does not list."""
    expected = {*manifest.files, MANIFEST, CHECKSUM}
    for name in sorted(os.listdir(directory)):
        if name not in expected and not name.startswith("."):
            yield (
                name,
                f"{path / name} is not part of the checkpoint: the manifest does not know it. If it"
                " is yours, move it elsewhere.",
            )


def _tensors(fragments: Fragments) -> str:
    names = list(dict.fromkeys(tensor for tensor, _, _ in fragments))
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" It holds {', '.join(map(repr, names[:_SHOWN]))}{more}."
