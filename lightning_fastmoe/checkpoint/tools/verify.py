"""Finds all damage in a checkpoint, where a reader would stop at the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_fastmoe.checkpoint.format import files, publish
from lightning_fastmoe.checkpoint.format.consistency import faults
from lightning_fastmoe.checkpoint.format.directory import (
    check_checksum,
    fragments_by_file,
    read_manifest,
    strangers,
    verify_file,
)
from lightning_fastmoe.checkpoint.format.json_values import Sized
from lightning_fastmoe.checkpoint.format.manifest import (
    CHECKSUM,
    MANIFEST,
    OBJECTS,
    STATE,
    Manifest,
    parse_manifest,
)
from lightning_fastmoe.checkpoint.format.pickles import count_objects, load_objects
from lightning_fastmoe.checkpoint.format.state_files import decode_rank_state, decode_state
from lightning_fastmoe.errors import CheckpointError

_ADVICE = (
    "If you trust the checkpoint's origin, pass --trusted, which skips this check, and load it with"
    " FastMoEStrategy(trust_checkpoints=True)."
)


@dataclass(frozen=True)
class Damage:
    """Something wrong with a checkpoint.

    Attributes:
        file: name of the damaged or inconsistent file.
        message: error message, with the path of the file and the names of tensors.
    """

    file: str
    message: str


class Audit:
    """Checks every byte of a checkpoint, and continues after finding damage.

    It trusts and executes nothing that it reads, and needs memory for one buffer and the manifest.

    Args:
        path: the path of the checkpoint.
        trusted: accept pickled objects of any class; they are not loaded.
        on_total: called once with the number of bytes to read.
        on_bytes: called with the number of bytes after each read.

    Attributes:
        manifest: the manifest once :meth:`damages` has read it; None if it can't be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        trusted: bool = False,
        on_total: Callable[[int], None] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.path = publish.resolve(path)
        self.manifest: Manifest | None = None
        self._trusted, self._on_total, self._on_bytes = trusted, on_total, on_bytes
        self._directory = -1

    def damages(self) -> Iterator[Damage]:
        """Yields the damage as it is found.

        Raises:
            CheckpointError: if the directory does not exist.
        """
        self._directory = files.open_directory(self.path)
        try:
            yield from self._manifest()
            if self.manifest is not None:
                for fault in faults(self.manifest, self.path / MANIFEST):
                    yield Damage(MANIFEST, fault)
                yield from self._files(self.manifest)
                for name, fault in strangers(self._directory, self.path, self.manifest):
                    yield Damage(name, fault)
        finally:
            os.close(self._directory)

    # --------------------------------------------------------------------------------- the manifest

    def _manifest(self) -> Iterator[Damage]:
        where = self.path / MANIFEST
        try:
            data = read_manifest(self._directory, self.path)
        except CheckpointError as error:
            yield Damage(MANIFEST, str(error))
            return
        try:
            check_checksum(self._directory, self.path, data)
        except CheckpointError as error:
            is_there = CHECKSUM in os.listdir(self._directory)
            yield Damage(MANIFEST if is_there else CHECKSUM, str(error))
        try:
            self.manifest = parse_manifest(data, where)
        except CheckpointError as error:
            yield Damage(MANIFEST, str(error))

    # ------------------------------------------------------------------------------------ the files

    def _files(self, manifest: Manifest) -> Iterator[Damage]:
        if self._on_total is not None:
            self._on_total(sum(record.size for record in manifest.files.values()))
        fragments = fragments_by_file(manifest)
        whole: list[str] = []
        for name, record in manifest.files.items():
            own = fragments.get(name, [])
            try:
                verify_file(self._directory, self.path, name, record, own, self._on_bytes)
            except CheckpointError as error:
                yield Damage(name, str(error))
            else:
                whole.append(name)
        yield from self._contents(manifest, [n for n in whole if not n.endswith(".safetensors")])

    def _contents(self, manifest: Manifest, names: list[str]) -> Iterator[Damage]:
        """Checks that JSON files and pickles can be read as plain data, as loading does."""
        objects: dict[str, Sized] = {}
        for name in sorted(names, key=lambda name: not name.endswith(".pt")):
            where = self.path / name
            try:
                data = files.read_small(self._directory, name, self.path, manifest.files[name].size)
                if name.endswith(".pt"):
                    # If the pickle is damaged, indices into it can't be checked: allow them all.
                    objects[name] = _Placeholders(2**62)
                    objects[name] = (
                        _Placeholders(count_objects(data, where))
                        if self._trusted
                        else load_objects(data, where, trusted=False, advice=_ADVICE)
                    )
                elif name == STATE:
                    decode_state(data, objects.get(OBJECTS, []), manifest.contents, where)
                else:
                    own = name.replace(".json", ".pt")
                    decode_rank_state(data, objects.get(own, []), where)
            except CheckpointError as error:
                yield Damage(name, str(error))


class _Placeholders:
    """Placeholder for a list that is not loaded; only its length is known."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> None:
        return None
