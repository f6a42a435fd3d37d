"""Rewrites a checkpoint's files for another number of ranks. Loading does not need this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.files import write_small
from lightning_fastmoe.checkpoint.format.publish import Publication
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import FileRecord
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.format.writer import WrittenFiles, write_manifest, write_rank
from lightning_fastmoe.checkpoint.tools.copying import copied_fragment

_WHOLE = 4096
"""Tensors with fewer elements per rank are not split."""


def reshard(
    reader: CheckpointReader,
    path: Path,
    ranks: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes a copy of a checkpoint with its tensors sharded evenly over ``ranks`` ranks' files.

    Large tensors are split into equal fragments, at boundaries between experts if ``ranks`` divides
    their number; small ones go whole to the rank with the fewest bytes. Everything else is copied
    unchanged, including the saving run's topology and per-rank states, so the copy still resumes
    exactly on that topology. Uses a few buffers of 4 MiB.

    Args:
        reader: the checkpoint; verify it first.
        path: path of the copy; a checkpoint there is replaced once the copy is complete.
        ranks: number of ranks to write files for.
        on_bytes: called with the number of bytes after each write.

    Raises:
        CheckpointError: see :class:`~lightning_fastmoe.checkpoint.format.publish.Publication`.
        OSError: if it can't be written.
    """
    publication = Publication(path)
    try:
        written = [
            write_rank(publication.directory, rank, fragments, None, on_bytes)
            for rank, fragments in enumerate(fragments_by_rank(reader, ranks))
        ]
        written.append(_copies(reader, publication.directory))
        manifest = replace(reader.manifest, files={}, tensors={})
        write_manifest(publication.directory, manifest, written)
        publication.commit()
    except BaseException:
        publication.abort()
        raise


def fragments_by_rank(reader: CheckpointReader, ranks: int) -> list[list[OwnedFragment]]:
    """The fragments that each rank writes."""
    fragments: list[list[OwnedFragment]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name, record in reader.manifest.tensors.items():
        if record.numel < ranks * _WHOLE:
            cuts = [(load.index(min(load)), 0, record.numel)]
        else:
            edges = [record.numel * rank // ranks for rank in range(ranks + 1)]
            cuts = [(rank, edges[rank], edges[rank + 1]) for rank in range(ranks)]
        for rank, start, stop in cuts:
            fragments[rank].append(copied_fragment(reader, name, record, start, stop))
            load[rank] += (stop - start) * DTYPES[record.dtype].itemsize
    return fragments


def _copies(reader: CheckpointReader, directory: Path) -> WrittenFiles:
    """Copies state.json, rank_*.json and objects.pt unchanged; nothing is unpickled."""
    result = WrittenFiles()
    for name in reader.manifest.files:
        if not name.endswith(".safetensors"):
            data = reader.read_file(name)
            result.files[name] = FileRecord(*write_small(directory / name, data))
    return result
