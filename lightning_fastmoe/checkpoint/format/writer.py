"""Writes the files of a checkpoint; ``checkpoint.save`` coordinates the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from lightning_fastmoe.checkpoint.format.consistency import check_manifest
from lightning_fastmoe.checkpoint.format.directory import checksum_line
from lightning_fastmoe.checkpoint.format.files import write_small
from lightning_fastmoe.checkpoint.format.json_values import encode
from lightning_fastmoe.checkpoint.format.layout import divide
from lightning_fastmoe.checkpoint.format.manifest import (
    CHECKSUM,
    MANIFEST,
    OBJECTS,
    STATE,
    Manifest,
)
from lightning_fastmoe.checkpoint.format.publish import Publication
from lightning_fastmoe.checkpoint.format.records import FileRecord, WrittenFragment, merge
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment, write_shard
from lightning_fastmoe.checkpoint.format.threads import run_all


@dataclass
class WrittenFiles:
    """Metadata of the files that a rank has written, for the rank that writes the manifest."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    fragments: list[WrittenFragment] = field(default_factory=list)


def write_rank(
    directory: Path,
    rank: int,
    fragments: Sequence[OwnedFragment],
    small: Mapping[str, bytes] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    *,
    max_files: int = 1,
    threads: int = 1,
) -> WrittenFiles:
    """Writes a rank's own files; stops at the first error.

    Args:
        directory: the directory of the unpublished checkpoint.
        rank: the rank, for the names of the files.
        fragments: the fragments that the rank owns.
        small: name -> content of further files, from :func:`pack`.
        on_bytes: see
            :func:`~lightning_fastmoe.checkpoint.format.safetensors_stream.write_safetensors`.
        max_files: see :func:`~lightning_fastmoe.checkpoint.format.layout.divide`.
        threads: number of files that are written at a time, each through two buffers of 4 MiB.
    """
    result = WrittenFiles()
    shards = divide(fragments, rank, max_files)
    names = sorted(shards, key=lambda name: -sum(fragment.size for fragment in shards[name]))
    jobs = [partial(write_shard, directory / name, shards[name]) for name in names]
    done = dict(zip(names, run_all(jobs, threads, on_bytes, _prepare(fragments)), strict=True))
    for name in shards:
        result.files[name], written = done[name]
        result.fragments += written
    for name, content in (small or {}).items():
        result.files[name] = FileRecord(*write_small(directory / name, content))
    return result


def _prepare(fragments: Sequence[OwnedFragment]) -> Callable[[], None] | None:
    """The function that a thread must call before it copies from a CUDA device, if any."""
    if not any(fragment.data is not None and fragment.data.is_cuda for fragment in fragments):
        return None
    # The other threads' streams would not wait for this thread's pending kernels. And a new thread
    # starts on device 0, where creating a CUDA context would take hundreds of megabytes.
    torch.cuda.current_stream().synchronize()
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def pack(json_name: str, objects_name: str, value: dict[str, Any]) -> dict[str, bytes]:
    """Encodes values as a JSON file, plus a pickle file if there are objects that JSON can't hold.

    Args:
        json_name: the name of the file of plain data.
        objects_name: the name of the file of pickled objects.
        value: the values to pack; may change afterwards.
    """
    objects: list[Any] = []
    result = {json_name: json.dumps(encode(value, objects), allow_nan=False).encode()}
    if objects:
        buffer = BytesIO()
        torch.save(objects, buffer)
        result[objects_name] = buffer.getvalue()
    return result


def pack_state(state: dict[str, Any]) -> dict[str, bytes]:
    """``state.json``, and ``objects.pt`` if needed."""
    return pack(STATE, OBJECTS, state)


def pack_rank_state(rank: int, state: dict[str, Any]) -> dict[str, bytes]:
    """``rank_NNNNN.json``, and ``rank_NNNNN.pt`` if needed."""
    return pack(f"rank_{rank:05d}.json", f"rank_{rank:05d}.pt", state)


def write_manifest(directory: Path, manifest: Manifest, written: Iterable[WrittenFiles]) -> None:
    """Adds the files and tensors of all ranks to the manifest, and writes it.

    Raises:
        CheckpointError: if the fragments of all ranks don't cover every tensor exactly once.
    """
    fragments: list[WrittenFragment] = []
    for one in written:
        manifest.files.update(one.files)
        fragments += one.fragments
    manifest.tensors = merge(fragments, directory)
    check_manifest(manifest, directory / MANIFEST)
    _, sha256 = write_small(directory / MANIFEST, manifest.dumps())
    write_small(directory / CHECKSUM, checksum_line(sha256))


def write_checkpoint(
    path: Path,
    manifest: Manifest,
    fragments: Sequence[OwnedFragment],
    state: dict[str, Any],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes a whole checkpoint from one process, for tools.

    Args:
        path: the final path; a checkpoint there is replaced once the new one is complete.
        manifest: its ``files`` and ``tensors`` are filled in.
        fragments: the fragments of every tensor.
        state: see ``docs/checkpoint_format.md``.
        on_bytes: see :func:`~lightning_fastmoe.checkpoint.format.shards.write_shard`.

    Raises:
        CheckpointError: see :class:`~lightning_fastmoe.checkpoint.format.publish.Publication`.
        OSError: if it can't be written.
    """
    publication = Publication(path)
    try:
        written = write_rank(publication.directory, 0, fragments, pack_state(state), on_bytes)
        write_manifest(publication.directory, manifest, [written])
        publication.commit()
    except BaseException:
        publication.abort()
        raise
