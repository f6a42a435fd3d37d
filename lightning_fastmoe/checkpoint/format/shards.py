"""Writes a rank's safetensors files, and checks their headers on reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPE_NAMES, itemsize
from lightning_fastmoe.checkpoint.format.files import BUFFER_BYTES, read_exactly
from lightning_fastmoe.checkpoint.format.fragment import Fragment, StoredFragment
from lightning_fastmoe.checkpoint.format.json_file import MAX_INTEGER, is_a, load_json
from lightning_fastmoe.checkpoint.format.records import FileRecord, WrittenFragment
from lightning_fastmoe.checkpoint.format.safetensors_stream import (
    MAX_HEADER_BYTES,
    StreamedTensor,
    write_safetensors,
)
from lightning_fastmoe.checkpoint.format.tensor_names import fragment_key
from lightning_fastmoe.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class OwnedFragment(Fragment):
    """A fragment of a tensor that this rank owns and will write.

    Attributes:
        tensor: name of the tensor in the manifest.
        shape: the shape of the whole tensor.
        dtype: the dtype of the elements.
        parts: see :class:`~lightning_fastmoe.checkpoint.format.safetensors_stream.StreamedTensor`.
        data: the elements, if they are in memory; otherwise None.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]
    data: Tensor | None = None

    @classmethod
    def of(cls, tensor: str, shape: Sequence[int], start: int, data: Tensor) -> OwnedFragment:
        """A fragment in memory: ``data (length,)``, contiguous, is kept as a view, not copied."""
        return cls(
            start,
            data.numel(),
            tensor=tensor,
            shape=tuple(shape),
            dtype=data.dtype,
            parts=lambda: (data,),
            data=data,
        )

    @property
    def key(self) -> str:
        """The fragment's name in the file."""
        return fragment_key(self.tensor, self)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.length * self.dtype.itemsize


@dataclass(frozen=True)
class HeaderEntry:
    """What a file's header says of a fragment; its bytes are ``begin`` to ``end`` of the file."""

    dtype: str
    length: int
    begin: int
    end: int


def write_shard(
    path: Path,
    fragments: Sequence[OwnedFragment],
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[FileRecord, list[WrittenFragment]]:
    """Streams fragments into a new safetensors file.

    For arguments and errors see
    :func:`~lightning_fastmoe.checkpoint.format.safetensors_stream.write_safetensors`.

    Returns:
        (the file, the fragments with their digests)
    """
    # Empty fragments add their tensor to the manifest, but are not in any file.
    streamed = [StreamedTensor(f.key, f.dtype, (f.length,), f.parts) for f in fragments if f.length]
    record, digests = write_safetensors(path, streamed, on_bytes)
    return record, [
        WrittenFragment(
            f.tensor,
            DTYPE_NAMES[f.dtype],
            f.shape,
            StoredFragment(f.start, f.length, path.name, digests.get(f.key, "")),
        )
        for f in fragments
    ]


def read_header(
    fd: int, size: int, expected: Sequence[tuple[str, str, StoredFragment]], where: Path
) -> dict[str, HeaderEntry]:
    """Reads a file's header and checks it against the manifest.

    Args:
        fd: the file.
        size: the size of the file, in bytes.
        expected: (tensor, dtype, fragment) of every fragment in the file.
        where: path of the file, for messages.

    Returns:
        key of a fragment -> its entry. The fragments fill the file from the header to the end.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    entries, begin = _parse_header(fd, size, where)
    result: dict[str, HeaderEntry] = {}
    for tensor, dtype, fragment in expected:
        key = fragment_key(tensor, fragment)
        entry = entries.pop(key, None)
        if entry is None:
            raise CheckpointError(
                f"{where} does not hold elements {fragment.start} to {fragment.stop} of tensor"
                f" {tensor!r}, which the manifest expects there: it is damaged or the wrong file."
            )
        if (entry.dtype, entry.length) != (dtype, fragment.length):
            raise CheckpointError(
                f"{where}: tensor {tensor!r} has {entry.length} elements of {entry.dtype}, but the"
                f" manifest expects {fragment.length} of {dtype}: it is damaged or the wrong file."
            )
        result[key] = entry
    if entries:
        raise CheckpointError(
            f"{where} holds {next(iter(entries))[:200]!r}, which the manifest does not list: the"
            " file is damaged or the wrong one."
        )
    position = begin
    for key, entry in sorted(result.items(), key=lambda item: item[1].begin):
        if entry.begin != position:
            raise CheckpointError(
                f"{where}: {key!r} begins at byte {entry.begin}, not at {position}, where the"
                " previous one ends: the file is damaged."
            )
        position = entry.end
    if position != size:
        raise CheckpointError(
            f"{where} has {size} bytes, but its tensors end at {position}: it was cut short or"
            " extended."
        )
    return result


def _parse_header(fd: int, size: int, where: Path) -> tuple[dict[str, HeaderEntry], int]:
    """(key -> entry, offset of the data)."""
    prefix = bytearray(8)
    if size < 8:
        raise CheckpointError(f"{where} has {size} bytes: it was cut short.")
    read_exactly(fd, memoryview(prefix), 0, where)
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{where} claims a header of {length} bytes, but has {size} bytes in all, and a header"
            f" may have at most {MAX_HEADER_BYTES}: the file is damaged, don't load it."
        )
    data = bytearray(length)
    read_exactly(fd, memoryview(data), 8, where)
    content = load_json(bytes(data), where)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(is_a(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: the header's __metadata__ is not a map of strings.")
    begin = 8 + length
    entries = {key: _entry(key, value, begin, where) for key, value in content.items()}
    return entries, begin


def _entry(key: str, value: Any, begin: int, where: Path) -> HeaderEntry:
    bad = CheckpointError(
        f"{where}: the header's entry of {key[:200]!r} is damaged: {str(value)[:80]}."
    )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPE_NAMES.values():
        raise bad
    for numbers, count in ((shape, 1), (offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) != count:
            raise bad
        if not all(is_a(n, int) and 0 <= n <= MAX_INTEGER for n in numbers):
            raise bad
    first, last = offsets
    if last - first != shape[0] * itemsize(dtype):
        raise bad
    return HeaderEntry(dtype, shape[0], begin + first, begin + last)


def chunks(begin: int, end: int, step: int = BUFFER_BYTES) -> Iterator[tuple[int, int]]:
    """Divides [begin, end) into ranges of at most ``step``, to pass through a buffer."""
    for start in range(begin, end, step):
        yield start, min(start + step, end)
