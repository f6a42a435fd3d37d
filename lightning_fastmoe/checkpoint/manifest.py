"""The manifest: what a checkpoint consists of. ``docs/checkpoint_format.md`` is its definition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from lightning_fastmoe.checkpoint.files import FILE_NAME
from lightning_fastmoe.checkpoint.records import (
    WEIGHTS,
    FileRecord,
    Piece,
    TensorRecord,
    check_coverage,
    check_tensor,
    itemsize,
    split_name,
)
from lightning_fastmoe.errors import CheckpointError

FORMAT = "lightning_fastmoe.checkpoint"
FORMAT_VERSION = 1
MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
STATE, OBJECTS = "state.json", "objects.pt"
MAX_MANIFEST_BYTES = 2**30


@dataclass(frozen=True)
class Topology:
    """How the run that saved was laid out; loading needs none of it."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    precision: str


@dataclass
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        written_by: name and version of the writer.
        contents: "weights", and "optimizer" if training can resume from it.
        topology: of the run that saved.
        progress: "epoch" and "global_step".
        moe_layers: layer name -> its ``num_experts``.
        excluded: parameters that were left out because they are frozen.
        tied: further names of parameters that are stored under their first one.
        files: every file but the manifest and its checksum.
        tensors: name -> where it is.
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
        """As JSON. The same manifest gives the same bytes."""
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
                    "pieces": [[p.start, p.length, order[p.file], p.digest] for p in record.pieces],
                }
                for name, record in sorted(self.tensors.items())
            },
        }
        return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()

    def check(self, where: object) -> None:
        """Refuses what contradicts itself; looks at no file.

        Raises:
            CheckpointError: naming the file or tensor.
        """
        data: dict[str, int] = {}
        for name, record in self.tensors.items():
            check_tensor(name, record.dtype, record.shape, where)
            check_coverage(name, record, where)
            for piece in record.pieces:
                data[piece.file] = data.get(piece.file, 0) + piece.length * itemsize(record.dtype)
        for file, size in data.items():
            if not file.endswith(".safetensors") or size > self.files[file].size:
                raise CheckpointError(
                    f"{where}: {file} is to hold {size} bytes of tensors, but it has"
                    f" {self.files[file].size} in all."
                )
        self._check_experts(where)
        for fault in self.module_expert_faults(where):
            raise CheckpointError(fault)

    def module_expert_faults(self, where: object) -> Iterator[str]:
        """Module experts of which something is nowhere, or there though it is not theirs."""
        start = f"{WEIGHTS}/"  # names may be forged: they are not split
        weights = {name.removeprefix(start) for name in self.tensors if name.startswith(start)}
        known = weights | self.tied.keys() | set(self.excluded)
        for layer, experts in self.module_experts.items():
            if self.moe_layers.get(layer) != len(experts):
                yield (
                    f"{where}: module_experts lists {len(experts)} experts of layer {layer!r},"
                    f" which has num_experts={self.moe_layers.get(layer)}."
                )
                continue
            listed = set()
            for i, names in enumerate(experts):
                full = [f"{layer}.experts.{i}.{name}" for name in names]
                listed.update(full)
                if lost := [name for name in full if name not in known]:
                    yield (
                        f"{where}: layer {layer!r}: expert {i} is missing: {', '.join(lost[:4])}"
                        f"{f' and {len(lost) - 4} more' if len(lost) > 4 else ''} in no file."
                    )
            for name in sorted(known - listed):
                if name.startswith(f"{layer}.experts."):
                    yield f"{where}: tensor {name!r} belongs to no expert of layer {layer!r}."

    def _check_experts(self, where: object) -> None:
        for name, record in self.tensors.items():
            kind, parameter = split_name(name)
            layer, found, rest = parameter.rpartition(".experts.")
            experts = self.moe_layers.get(layer)
            shape = record.shape[1:] if kind == "gradients/local" else record.shape
            if not found or "." in rest or experts is None or not shape:
                continue
            if shape[0] != experts:
                raise CheckpointError(
                    f"{where}: tensor {name!r} has {shape[0]} experts, but layer {layer!r} has"
                    f" num_experts={experts}."
                )


def parse_manifest(data: bytes, where: object, *, check: bool = True) -> Manifest:
    """Reads and checks a manifest.

    Args:
        data: the file's bytes.
        where: its path, for messages.
        check: False leaves :meth:`Manifest.check` to the caller, who wants all contradictions.

    Raises:
        CheckpointError: if it is no manifest, of another version, or contradicts itself.
    """
    content = load_json(data, where)
    read = _Fields(content, where)
    if read.get("format", str) != FORMAT:
        raise CheckpointError(
            f"{where} has format {content['format']!r}, not {FORMAT!r}: it is no checkpoint of this"
            " package."
        )
    version = read.get("format_version", int)
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an unknown"
        raise CheckpointError(
            f"{where} has format_version {version}; this version of lightning_fastmoe reads"
            f" {FORMAT_VERSION}. It was written by {age} version"
            f" ({content.get('written_by')!r}): upgrade lightning_fastmoe."
        )
    files = _files(read.get("files", list), where)
    manifest = Manifest(
        written_by=read.get("written_by", str),
        contents=tuple(read.strings("contents")),
        topology=_topology(read.get("topology", dict), where),
        progress=read.mapping("progress", int),
        moe_layers=read.mapping("moe_layers", int),
        module_experts=_module_experts(read, where),
        excluded=tuple(read.strings("excluded")),
        tied=read.mapping("tied", str),
        files=files,
        tensors=_tensors(read.get("tensors", dict), list(files), where),
    )
    read.nothing_else()
    if check:
        manifest.check(where)
    return manifest


def load_json(data: bytes, where: object) -> dict[str, Any]:
    """A JSON object; no key twice, no NaN, no depth that breaks the parser.

    Raises:
        CheckpointError: if it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where}: the key {twice!r} is there twice.")
        return result

    def constant(text: str) -> Any:
        raise CheckpointError(f"{where}: {text} is not JSON.")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object.")
    return cast(dict[str, Any], value)


def is_a(value: Any, kind: type) -> bool:
    """``isinstance``, but a bool is no int."""
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


class _Fields:
    """The fields of a JSON object, each taken once and of the expected type."""

    def __init__(self, content: dict[str, Any], where: object) -> None:
        self.content, self.where, self.left = content, where, set(content)

    def get(self, name: str, kind: type) -> Any:
        if not is_a(self.content.get(name), kind):
            raise CheckpointError(
                f"{self.where}: the field {name!r} is missing or no {kind.__name__}."
            )
        self.left.discard(name)
        return self.content[name]

    def strings(self, name: str) -> list[str]:
        return [str(v) for v in self._all(name, self.get(name, list), str)]

    def mapping(self, name: str, kind: type) -> dict[str, Any]:
        value = self.get(name, dict)
        self._all(name, value.values(), kind)
        return dict(value)

    def _all(self, name: str, values: Any, kind: type) -> Any:
        if not all(is_a(v, kind) for v in values):
            raise CheckpointError(f"{self.where}: the field {name!r} holds no {kind.__name__}.")
        return values

    def nothing_else(self) -> None:
        if self.left:
            raise CheckpointError(
                f"{self.where}: unknown fields {sorted(self.left)}. This version does not know"
                " what they mean."
            )


def _topology(value: dict[str, Any], where: object) -> Topology:
    read = _Fields(value, f"{where}: topology")
    result = Topology(
        read.get("world_size", int),
        read.get("expert_parallel_size", int),
        read.get("zero_stage", int),
        read.get("precision", str),
    )
    read.nothing_else()
    return result


def _module_experts(read: _Fields, where: object) -> dict[str, list[list[str]]]:
    """Only there if the model has such experts."""
    if "module_experts" not in read.content:
        return {}
    layers = read.mapping("module_experts", list)
    for layer, experts in layers.items():
        for names in experts:
            if not is_a(names, list) or not all(is_a(name, str) for name in names):
                raise CheckpointError(
                    f"{where}: module_experts of layer {layer!r} is no list of lists of names."
                )
    return layers


def _files(rows: list[Any], where: object) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    for row in rows:
        name, size, sha256 = _row(row, (str, int, str), f"{where}: files")
        if not FILE_NAME.fullmatch(name) or name in (MANIFEST, CHECKSUM):
            raise CheckpointError(
                f"{where}: {name!r} is no name of a checkpoint's file ({FILE_NAME.pattern}). The"
                " manifest was not written by this package: don't load it."
            )
        if name in files:
            raise CheckpointError(f"{where}: the file {name!r} is listed twice.")
        if size < 0 or len(sha256) != 64:
            raise CheckpointError(f"{where}: {name} has no proper size and SHA-256.")
        files[name] = FileRecord(size, sha256)
    return files


def _tensors(content: dict[str, Any], files: list[str], where: object) -> dict[str, TensorRecord]:
    tensors = {}
    for name, value in content.items():
        here = f"{where}: tensor {name!r}"
        read = _Fields(value if isinstance(value, dict) else {}, here)
        dtype, shape = read.get("dtype", str), read.get("shape", list)
        rows = read.get("pieces", list)
        read.nothing_else()
        if not all(is_a(d, int) for d in shape):
            raise CheckpointError(f"{here}: the shape {shape} is no list of integers.")
        pieces = []
        for row in rows:
            start, length, file, digest = _row(row, (int, int, int, str), here)
            if not 0 <= file < len(files):
                raise CheckpointError(f"{here}: there is no file number {file}.")
            pieces.append(Piece(start, length, files[file], digest))
        tensors[name] = TensorRecord(dtype, tuple(shape), tuple(pieces))
    return tensors


def _row(value: Any, kinds: tuple[type, ...], where: object) -> list[Any]:
    good = isinstance(value, list) and len(value) == len(kinds)
    if not good or not all(is_a(v, k) for v, k in zip(value, kinds, strict=True)):
        names = ", ".join(k.__name__ for k in kinds)
        raise CheckpointError(f"{where}: expected [{names}], found {str(value)[:80]}.")
    return cast(list[Any], value)
