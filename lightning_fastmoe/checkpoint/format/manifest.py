"""The manifest, which lists a checkpoint's files and tensors; see ``docs/checkpoint_format.md``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

from lightning_fastmoe.checkpoint.format.files import FILE_NAME
from lightning_fastmoe.checkpoint.format.fragment import StoredFragment
from lightning_fastmoe.checkpoint.format.json_file import MAX_INTEGER, Fields, is_a, load_json
from lightning_fastmoe.checkpoint.format.records import MAX_NAME, FileRecord, TensorRecord
from lightning_fastmoe.errors import CheckpointError

FORMAT = "lightning_fastmoe.checkpoint"
FORMAT_VERSION = 1
MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
STATE, OBJECTS = "state.json", "objects.pt"
MAX_MANIFEST_BYTES = 2**30

_CONTENTS = (["weights"], ["weights", "optimizer"])
_LISTED = re.compile(
    r"(weights|optimizer)_\d{5,9}(_\d{1,9})?\.safetensors|rank_\d{5,9}\.(json|pt)"
    r"|state\.json|objects\.pt",
    re.ASCII,
)
"""Pattern of the file names that a manifest may list."""

_SHA256 = re.compile("[0-9a-f]{64}")
_DIGEST = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True)
class Topology:
    """Topology and precision of the run that saved; loading doesn't depend on them."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    precision: str


@dataclass
class Manifest:
    """Description of a checkpoint: its files, tensors and MoE layers.

    Attributes:
        written_by: name and version of the writer.
        contents: "weights", and "optimizer" if training can resume from it.
        topology: the topology of the run that saved.
        progress: "epoch" and "global_step".
        moe_layers: layer name -> its ``num_experts``.
        excluded: frozen parameters that were not saved.
        tied: further name of a parameter -> its first name, under which it is stored.
        files: name -> size and hash of every file except the manifest and its checksum.
        tensors: name -> dtype, shape and the fragments that it is stored in.
        module_experts: layer whose experts are modules -> for each expert, by its global id, the
            names of its parameters and buffers inside it.
    """

    written_by: str
    contents: tuple[str, ...]
    topology: Topology
    progress: dict[str, int]
    moe_layers: dict[str, int]
    excluded: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    module_experts: dict[str, list[list[str]]] = field(default_factory=dict)

    def dumps(self) -> bytes:
        """Serializes to JSON; equal manifests give equal bytes."""
        order = {name: i for i, name in enumerate(sorted(self.files))}
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "written_by": self.written_by,
            "contents": list(self.contents),
            "topology": vars(self.topology),
            "progress": self.progress,
            "moe_layers": self.moe_layers,
            **({"module_experts": self.module_experts} if self.module_experts else {}),
            "excluded": list(self.excluded),
            "tied": self.tied,
            "files": [[n, self.files[n].size, self.files[n].sha256] for n in order],
            "tensors": {
                name: {
                    "dtype": record.dtype,
                    "shape": list(record.shape),
                    "pieces": [
                        [f.start, f.length, order[f.file], f.digest] for f in record.fragments
                    ],
                }
                for name, record in sorted(self.tensors.items())
            },
        }
        return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()


def is_file_name(name: str) -> bool:
    """Whether a manifest may list a file of that name."""
    return _LISTED.fullmatch(name) is not None


def parse_manifest(data: bytes, where: object) -> Manifest:
    """Parses a manifest and checks the type and range of each field.

    Whether the fields are consistent is checked by
    :func:`~lightning_fastmoe.checkpoint.format.consistency.faults`.

    Args:
        data: the file's bytes.
        where: its path, for messages.

    Raises:
        CheckpointError: if it is not a manifest, or has an unsupported version.
    """
    content = load_json(data, where)
    read = Fields(content, where)
    if read.get("format", str) != FORMAT:
        raise CheckpointError(
            f"{where} has format {content['format']!r}, not {FORMAT!r}: it was not written by"
            " this package."
        )
    version = read.get("format_version", int)
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an unknown"
        raise CheckpointError(
            f"{where} has format_version {str(version)[:40]}; this version of lightning_fastmoe"
            f" reads {FORMAT_VERSION}. It was written by {age} version"
            f" ({str(content.get('written_by'))[:80]!r}): upgrade lightning_fastmoe."
        )
    contents = read.strings("contents")
    if contents not in _CONTENTS:
        raise CheckpointError(
            f"{where}: contents is {str(contents)[:80]}; it must be {_CONTENTS[0]} or"
            f" {_CONTENTS[1]}."
        )
    files = _files(read.get("files", list), where)
    manifest = Manifest(
        written_by=read.get("written_by", str),
        contents=tuple(contents),
        topology=_topology(read.get("topology", dict), where),
        progress=_progress(read.get("progress", dict), where),
        moe_layers=read.counts("moe_layers", least=1),
        module_experts=_module_experts(read, where),
        excluded=tuple(read.strings("excluded")),
        tied=read.names("tied"),
        files=files,
        tensors=_tensors(read.get("tensors", dict), list(files), where),
    )
    read.nothing_else()
    _check_names(manifest, where)
    return manifest


def _check_names(manifest: Manifest, where: object) -> None:
    """Limits the length of names, so that parsing forged ones stays fast."""
    experts = (n for layer in manifest.module_experts.values() for names in layer for n in names)
    tied = (*manifest.tied, *manifest.tied.values())
    layers = (*manifest.moe_layers, *manifest.module_experts)
    for name in chain(manifest.tensors, manifest.excluded, tied, layers, experts):
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"{where}: a name of {len(name)} characters, {name[:80]!r}...: names have at most"
                f" {MAX_NAME}."
            )


def _topology(value: dict[str, Any], where: object) -> Topology:
    read = Fields(value, f"{where}: topology")
    result = Topology(
        read.count("world_size", least=1),
        read.count("expert_parallel_size", least=1),
        read.count("zero_stage"),
        read.get("precision", str),
    )
    read.nothing_else()
    if result.world_size % result.expert_parallel_size or result.zero_stage > 3:
        raise CheckpointError(
            f"{where}: the topology {vars(result)} is invalid: expert_parallel_size must divide"
            " world_size, and zero_stage must be 0 to 3."
        )
    return result


def _progress(value: dict[str, Any], where: object) -> dict[str, int]:
    read = Fields(value, f"{where}: progress")
    result = {name: read.count(name) for name in ("epoch", "global_step")}
    read.nothing_else()
    return result


def _module_experts(read: Fields, where: object) -> dict[str, list[list[str]]]:
    """An optional field, written only if the model has module experts."""
    if "module_experts" not in read.content:
        return {}
    layers = read.lists("module_experts")
    for layer, experts in layers.items():
        for names in experts:
            if not is_a(names, list) or not all(is_a(name, str) for name in names):
                raise CheckpointError(
                    f"{where}: module_experts of layer {layer!r} is not a list of lists of names."
                )
            if len(set(names)) != len(names):
                raise CheckpointError(
                    f"{where}: module_experts of layer {layer!r} lists a name twice in one expert."
                )
    return layers


def _files(rows: list[Any], where: object) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    last = ""
    for row in rows:
        name, size, sha256 = _row(row, (str, int, str), f"{where}: files")
        if not is_file_name(name):
            raise CheckpointError(
                f"{where}: {name[:80]!r} is not a checkpoint file name ({FILE_NAME.pattern},"
                " and of a kind that the format describes). The manifest was not written by this"
                " package: don't load it."
            )
        if name in files:
            raise CheckpointError(f"{where}: the file {name!r} is listed twice.")
        if name < last:
            raise CheckpointError(
                f"{where}: files must be sorted by name: {name!r} after {last!r}."
            )
        if not 0 <= size <= MAX_INTEGER or not _SHA256.fullmatch(sha256):
            raise CheckpointError(f"{where}: {name} has an invalid size or SHA-256.")
        files[name] = FileRecord(size, sha256)
        last = name
    return files


def _tensors(content: dict[str, Any], files: list[str], where: object) -> dict[str, TensorRecord]:
    tensors = {}
    for name, value in content.items():
        here = f"{where}: tensor {name[:200]!r}"
        read = Fields(value if isinstance(value, dict) else {}, here)
        dtype, shape = read.get("dtype", str), read.get("shape", list)
        rows = read.get("pieces", list)
        read.nothing_else()
        if not all(is_a(d, int) for d in shape):
            raise CheckpointError(f"{here}: the shape {str(shape)[:80]} is not a list of integers.")
        fragments = []
        for row in rows:
            start, length, file, digest = _row(row, (int, int, int, str), here)
            if not 0 <= file < len(files):
                raise CheckpointError(f"{here}: file number {str(file)[:40]} does not exist.")
            if not (0 <= start <= MAX_INTEGER and 0 <= length <= MAX_INTEGER):
                raise CheckpointError(
                    f"{here} has a fragment at an invalid position: {str(row)[:80]}."
                )
            if not _DIGEST.fullmatch(digest):
                raise CheckpointError(
                    f"{here} has a fragment with the digest {digest[:80]!r}, not 8 hexadecimal"
                    " digits."
                )
            fragments.append(StoredFragment(start, length, files[file], digest))
        tensors[name] = TensorRecord(dtype, tuple(shape), tuple(fragments))
    return tensors


def _row(value: Any, kinds: tuple[type, ...], where: object) -> list[Any]:
    good = isinstance(value, list) and len(value) == len(kinds)
    if not good or not all(is_a(v, k) for v, k in zip(value, kinds, strict=True)):
        names = ", ".join(k.__name__ for k in kinds)
        raise CheckpointError(f"{where}: expected [{names}], found {str(value)[:80]}.")
    return cast(list[Any], value)
