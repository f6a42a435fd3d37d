"""Deleting a checkpoint, and nothing else: files that users put into its directory are kept."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

from lightning_fastmoe.checkpoint.format.json_file import load_json
from lightning_fastmoe.checkpoint.format.manifest import (
    CHECKSUM,
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    is_file_name,
)
from lightning_fastmoe.errors import CheckpointError

_OF_NFS = ".nfs"
"""So a network file system calls what is deleted and still open; it goes by itself."""


def check_replaceable(path: Path) -> None:
    """Refuses a path whose directory a save would delete though it is not a checkpoint.

    What lies in a checkpoint's directory without being a part of it is not in the way:
    :func:`discard` keeps it.

    Raises:
        CheckpointError: naming a file that is in the way, or if the directory is read-only.
    """
    if path.is_symlink() or not path.is_dir():
        return
    found = sorted(os.listdir(path))
    if found and MANIFEST not in _own_files(path):
        raise CheckpointError(
            f"{path} is a directory with other files than a checkpoint's ({found[0]!r}, ...), which"
            " saving would delete. Choose another path, or move it elsewhere."
        )
    if found and not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path} is read-only, so it can't be replaced by a newer checkpoint. Choose another"
            " path, or make it writable."
        )


def discard(directory: Path, path: Path, *, strict: bool = True, unfinished: bool = False) -> None:
    """Deletes a checkpoint's own files; what else lies there is moved beside it, with a warning.

    Args:
        directory: a checkpoint's, which has lost its name already; or a file or a link.
        path: how it was called.
        strict: raise if something can't be deleted; else leave it for the next save.
        unfinished: it is of a save that died, which may have been writing its manifest.

    Raises:
        OSError: if ``strict``.
    """
    with contextlib.nullcontext() if strict else contextlib.suppress(OSError):
        if directory.is_symlink() or not directory.is_dir():
            directory.unlink()
            return
        own = _own_files(directory, unfinished)
        # The manifest goes last: who is stopped before still knows what to delete.
        for name in sorted(own, key=lambda name: (name == MANIFEST, name)):
            entry = directory / name
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
        left = sorted(n for n in os.listdir(directory) if not n.startswith(_OF_NFS))
        if left:
            kept = _free_name(path)
            os.rename(directory, kept)
            warnings.warn(
                f"{path} held {', '.join(left[:4])}{' and more' if left[4:] else ''}, which belongs"
                f" to no checkpoint. It was kept, and is in {kept} now.",
                stacklevel=2,
            )
            return
        with contextlib.suppress(OSError):  # files that NFS still holds
            os.rmdir(directory)


def _own_files(directory: Path, unfinished: bool = False) -> set[str]:
    """The files that belong to a checkpoint: as its manifest says, else by their names."""
    found = {name for name in os.listdir(directory) if not (directory / name).is_dir()}
    listed = _listed(directory)
    if listed is not None:
        return found & {*listed, MANIFEST, CHECKSUM}
    own = {name for name in found if is_file_name(name)}
    # Other programs have files called manifest.json; that pair is ours, be it damaged.
    pair = found & {MANIFEST, CHECKSUM}
    return own | pair if unfinished or len(pair) == 2 else own


def _listed(directory: Path) -> set[str] | None:
    manifest = directory / MANIFEST
    try:
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            return None
        content = load_json(manifest.read_bytes(), manifest)
        if content.get("format") != FORMAT:
            return None
        return {row[0] for row in content["files"] if is_file_name(row[0])}
    except (OSError, CheckpointError, LookupError, TypeError):
        return None


def _free_name(path: Path) -> Path:
    """Beside the checkpoint; no name that looks like one's to who looks for the last."""
    kept, number = path.with_name(f"{path.name}.kept"), 0
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.kept-{number}")
    return kept
