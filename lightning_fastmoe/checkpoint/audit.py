"""Finding everything that is wrong with a checkpoint, where a reader stops at the first."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_fastmoe.checkpoint import files, publish
from lightning_fastmoe.checkpoint.manifest import (
    CHECKSUM,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    OBJECTS,
    STATE,
    Manifest,
    load_json,
    parse_manifest,
)
from lightning_fastmoe.checkpoint.plain import decode
from lightning_fastmoe.checkpoint.records import (
    WEIGHTS,
    Piece,
    TensorRecord,
    check_coverage,
    check_tensor,
    piece_key,
    split_name,
    weight_name,
)
from lightning_fastmoe.checkpoint.shards import read_header
from lightning_fastmoe.checkpoint.verify import Mark, check_hash
from lightning_fastmoe.errors import CheckpointError


@dataclass(frozen=True)
class Damage:
    """Something wrong with a checkpoint.

    Attributes:
        file: name of the file that shows it.
        message: what is wrong, with the path of the file and the names of tensors.
    """

    file: str
    message: str


class Audit:
    """Looks at every byte of a checkpoint and goes on after each damage.

    Nothing of what it reads is trusted or run; memory stays within a buffer and the manifest.

    Args:
        path: of the checkpoint.
        trusted: don't complain of objects that only an unpickler that runs code could restore.
        on_total: called once with the number of bytes that will be read.
        on_bytes: called with the number of bytes after each read.

    Attributes:
        manifest: once :meth:`damages` has read it; None if it can't be.
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
        """What is wrong, as it is found.

        Raises:
            CheckpointError: if there is no such directory.
        """
        self._directory = files.open_directory(self.path)
        try:
            yield from self._manifest()
            if self.manifest is not None:
                yield from self._contradictions(self.manifest)
                yield from self._files(self.manifest)
                yield from self._strangers(self.manifest)
        finally:
            os.close(self._directory)

    # --------------------------------------------------------------------------------- the manifest

    def _manifest(self) -> Iterator[Damage]:
        try:
            data = files.read_small(self._directory, MANIFEST, self.path, MAX_MANIFEST_BYTES)
        except CheckpointError as error:
            yield Damage(MANIFEST, str(error))
            return
        try:
            line = files.read_small(self._directory, CHECKSUM, self.path, 1000)
            checksum = hashlib.sha256(data).hexdigest()
            if line.decode("ascii", "replace").split() != [checksum, MANIFEST]:
                yield Damage(
                    MANIFEST,
                    f"{self.path / MANIFEST} does not match {CHECKSUM}: one of them is damaged.",
                )
        except CheckpointError as error:
            yield Damage(CHECKSUM, str(error))
        try:
            self.manifest = parse_manifest(data, self.path / MANIFEST, check=False)
        except CheckpointError as error:
            yield Damage(MANIFEST, str(error))

    def _contradictions(self, manifest: Manifest) -> Iterator[Damage]:
        where = self.path / MANIFEST
        found = 0
        for message in [*_tensor_faults(manifest, where), *_layer_faults(manifest, where)]:
            found += 1
            yield Damage(MANIFEST, message)
        if not found:
            try:
                manifest.check(where)
            except CheckpointError as error:
                yield Damage(MANIFEST, str(error))

    # ------------------------------------------------------------------------------------ the files

    def _files(self, manifest: Manifest) -> Iterator[Damage]:
        if self._on_total is not None:
            self._on_total(sum(record.size for record in manifest.files.values()))
        pieces: dict[str, list[tuple[str, str, Piece]]] = {}
        for name, record in manifest.tensors.items():
            for piece in record.pieces:
                pieces.setdefault(piece.file, []).append((name, record.dtype, piece))
        for name in manifest.files:
            try:
                self._check_file(name, manifest, pieces.get(name, []))
            except CheckpointError as error:
                yield Damage(name, str(error))

    def _check_file(
        self, name: str, manifest: Manifest, pieces: list[tuple[str, str, Piece]]
    ) -> None:
        where, record = self.path / name, manifest.files[name]
        tensors = _listed([tensor for tensor, _, _ in pieces])
        try:
            fd, size = files.open_regular(self._directory, name, self.path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{tensors}") from error
        try:
            if size != record.size:
                raise CheckpointError(
                    f"{where} has {size} bytes, the manifest says {record.size}: it was cut short"
                    f" or replaced.{tensors}"
                )
            marks = []
            if name.endswith(".safetensors"):
                header = read_header(fd, size, pieces, where)
                for tensor, _, piece in pieces:
                    entry = header[piece_key(tensor, piece.start, piece.stop)]
                    what = f"tensor {tensor!r}, elements {piece.start} to {piece.stop}"
                    marks.append(Mark(entry.end, piece.digest, what))
            check_hash(fd, where, record.sha256, marks, self._on_bytes)
        finally:
            os.close(fd)
        if not name.endswith(".safetensors"):
            objects = OBJECTS if name == STATE else name.replace(".json", ".pt")
            self._check_content(name, record.size, objects in manifest.files)

    def _check_content(self, name: str, size: int, has_objects: bool) -> None:
        """What JSON and the pickle hold must be readable as plain data."""
        where = self.path / name
        data = files.read_small(self._directory, name, self.path, size)
        if name.endswith(".pt"):
            if not self._trusted:
                _check_objects(data, where)
            return
        content = load_json(data, where)
        try:
            # What the pickle beside it holds is looked at by itself: any object will do here.
            places: Any = _Anything() if has_objects else []
            decode(content, places, where)
        except RecursionError as error:
            raise CheckpointError(f"{where} is nested too deeply: don't load it.") from error

    def _strangers(self, manifest: Manifest) -> Iterator[Damage]:
        expected = {*manifest.files, MANIFEST, CHECKSUM}
        for name in sorted(os.listdir(self._directory)):
            if name not in expected and not name.startswith("."):
                yield Damage(
                    name,
                    f"{self.path / name} is not part of the checkpoint: the manifest does not know"
                    " it. If it is yours, move it elsewhere.",
                )


class _Anything(list[Any]):
    """A list with an element at every index."""

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: Any) -> Any:
        return None


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f" It holds {', '.join(map(repr, names[:4]))}{more}."


def _check_objects(data: bytes, where: Path) -> None:
    try:
        objects = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where} holds objects that are not plain data, and loading them could run any code:"
            f" {error}"
        ) from error
    except Exception as error:  # whatever a forged file makes the unpickler stumble over
        raise CheckpointError(f"{where} can't be read: {error}") from error
    if not isinstance(objects, list):
        raise CheckpointError(f"{where} holds no list: it was not written by this package.")


# ----------------------------------------------------------------------------- tensors and experts


def _tensor_faults(manifest: Manifest, where: Path) -> Iterator[str]:
    for name, record in manifest.tensors.items():
        try:
            check_tensor(name, record.dtype, record.shape, where)
        except CheckpointError as error:
            yield str(error)
            continue
        layer = _layer_of(name, manifest)
        faults = [] if layer is None else list(_expert_faults(name, layer, record, manifest, where))
        yield from faults
        if not faults:
            try:
                check_coverage(name, record, where)
            except CheckpointError as error:
                yield str(error)
    for name, first in manifest.tied.items():
        if weight_name(first) not in manifest.tensors:
            yield f"{where}: {name!r} is said to be stored as {first!r}, which isn't there."


def _layer_of(tensor: str, manifest: Manifest) -> str | None:
    """The MoE layer whose experts a tensor stacks."""
    layer, found, rest = split_name(tensor)[1].rpartition(".experts.")
    return layer if found and "." not in rest and layer in manifest.moe_layers else None


def _expert_faults(
    name: str, layer: str, record: TensorRecord, manifest: Manifest, where: Path
) -> Iterator[str]:
    """Experts that are in no file, or twice."""
    experts = manifest.moe_layers[layer]
    if not record.shape or record.numel == 0:
        return
    if record.shape[0] != experts:
        yield (
            f"{where}: tensor {name!r} has {record.shape[0]} experts, but layer {layer!r} has"
            f" num_experts={experts}."
        )
        return
    size = record.numel // experts
    gaps, overlaps, position = [], [], 0
    for piece in sorted(record.pieces):
        if piece.start > position:
            gaps.append((position, piece.start))
        elif piece.start < position:
            overlaps.append((piece.start, min(position, piece.stop)))
        position = max(position, piece.stop)
    if position < record.numel:
        gaps.append((position, record.numel))
    for spans, what in ((gaps, "missing"), (overlaps, "there twice")):
        for start, stop in spans:
            first, last = start // size, max(start, stop - 1) // size
            which = f"expert {first} is" if first == last else f"experts {first} to {last} are"
            yield f"{where}: layer {layer!r}: {which} {what} in tensor {name!r}."


def _layer_faults(manifest: Manifest, where: Path) -> Iterator[str]:
    """Layers that lost their experts as a whole."""
    known = [*manifest.tied, *manifest.excluded]
    known += [t.removeprefix(f"{WEIGHTS}/") for t in manifest.tensors if t.startswith(WEIGHTS)]
    yield from manifest.module_expert_faults(where)
    for layer, experts in manifest.moe_layers.items():
        # Module experts may have no parameters at all; what they have is listed.
        has_some = any(name.startswith(f"{layer}.experts.") for name in known)
        if not has_some and layer not in manifest.module_experts:
            yield f"{where}: layer {layer!r}: none of its {experts} experts is in the checkpoint."
