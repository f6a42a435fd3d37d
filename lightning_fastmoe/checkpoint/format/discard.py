"""Deletes a checkpoint but keeps files that users have put into its directory."""

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
"""Prefix that NFS gives to files that were deleted while open; it removes them on its own."""

_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
"""Of files with weights: what other strategies have saved may be replaced."""


def check_replaceable(path: Path) -> None:
    """Refuses to replace a directory or a file that is not a checkpoint.

    Extra files in a checkpoint's directory are allowed: :func:`discard` keeps them.

    Raises:
        CheckpointError: naming a file that is in the way, or if the directory is read-only.
    """
    if path.is_symlink() or not path.is_dir():
        if path.is_file() and not _may_be_checkpoint(path):
            raise CheckpointError(
                f"{path} is a file that doesn't look like a checkpoint, and saving would delete it."
                " Choose another path, or move it elsewhere."
            )
        return
    found = sorted(os.listdir(path))
    if found and MANIFEST not in _own_files(path):
        raise CheckpointError(
            f"{path} is a directory that is not a checkpoint (it contains {found[0]!r}), and saving"
            " would delete it. Choose another path, or move it elsewhere."
        )
    if found and not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path} is read-only, so it can't be replaced by a newer checkpoint. Choose another"
            " path, or make it writable."
        )


def _may_be_checkpoint(file: Path) -> bool:
    """By its name, or as torch.save() begins: a zip archive or a pickle."""
    if file.suffix in _SUFFIXES:
        return True
    try:
        with file.open("rb") as opened:
            head = opened.read(2)
    except OSError:
        return False
    return head in (b"", b"PK") or head.startswith(b"\x80")


def discard(directory: Path, path: Path, *, strict: bool = True, unfinished: bool = False) -> None:
    """Deletes a checkpoint's own files; other files are kept under a new name, with a warning.

    Args:
        directory: the checkpoint, already renamed to a hidden name; or a file or a link.
        path: its former name.
        strict: raise if something can't be deleted; otherwise leave it for the next save.
        unfinished: it was left by a save that died, perhaps while writing the manifest.

    Raises:
        OSError: if ``strict``.
    """
    with contextlib.nullcontext() if strict else contextlib.suppress(OSError):
        if directory.is_symlink() or not directory.is_dir():
            directory.unlink()
            return
        own = _own_files(directory, unfinished)
        # The manifest goes last, so that an interrupted deletion can be completed.
        for name in sorted(own, key=lambda name: (name == MANIFEST, name)):
            entry = directory / name
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
        left = sorted(n for n in os.listdir(directory) if not n.startswith(_OF_NFS))
        if left:
            kept = _free_name(path)
            os.rename(directory, kept)
            warnings.warn(
                f"{path} contained files that are not part of the checkpoint: {', '.join(left[:4])}"
                f"{' and more' if left[4:] else ''}. They were kept, in {kept}.",
                stacklevel=2,
            )
            return
        with contextlib.suppress(OSError):  # files that NFS still holds
            os.rmdir(directory)


def _own_files(directory: Path, unfinished: bool = False) -> set[str]:
    """The files that belong to a checkpoint: those that its manifest lists, else by their names."""
    found = {name for name in os.listdir(directory) if not (directory / name).is_dir()}
    listed = _listed(directory)
    if listed is not None:
        return found & {*listed, MANIFEST, CHECKSUM}
    own = {name for name in found if is_file_name(name)}
    # Other programs write a manifest.json too; both files together are ours, even if damaged.
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
    """An unused name next to the checkpoint that ``ckpt_path="last"`` does not take for one."""
    kept, number = path.with_name(f"{path.name}.kept"), 0
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.kept-{number}")
    return kept
