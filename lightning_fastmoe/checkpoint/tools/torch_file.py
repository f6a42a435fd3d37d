"""Writes a file for ``torch.load`` as a stream.

``torch.save`` needs every tensor in memory. Under ``torch.serialization.skip_data`` it writes the
archive but leaves gaps for the tensors' data; here they are filled in one after the other.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor, byte_view
from lightning_fastmoe.errors import CheckpointError

_STATE_DICT = "state_dict"
_LOCAL_HEADER, _CENTRAL_HEADER = 30, 46
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16


@dataclass(frozen=True)
class _Record:
    """Positions of a record's bytes and of the two copies of its CRC-32 in an archive."""

    name: str
    begin: int
    size: int
    checksums: tuple[int, int]


def write_torch(
    path: Path,
    tensors: Sequence[StreamedTensor],
    tied: Mapping[str, str],
    rest: Mapping[str, Any],
    extra_state: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes ``{"state_dict": {...}, **rest}`` and waits until it is on the disk.

    The file has the same content as one from ``torch.save``, and is a valid zip archive. Needs
    memory for what ``parts`` yields and for ``rest``.

    Args:
        path: overwritten if it exists.
        tensors: the state dict.
        tied: further name -> the name of the tensor that it shares.
        rest: the other entries, written as ``torch.save`` does.
        extra_state: entries of the state dict that are not tensors.
        on_bytes: called with the number of bytes after each write.

    Raises:
        OSError: if it can't be written.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    with FakeTensorMode():
        fakes: dict[str, Any] = {t.key: torch.empty(t.shape, dtype=t.dtype) for t in tensors}
    state = {**fakes, **{name: fakes[first] for name, first in tied.items()}}
    extra = dict(extra_state or {})
    # The streamed tensors come first: they are the records data/0, data/1, ... in this order. Those
    # in `extra` and `rest` follow, in the same order as when they are saved on their own.
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({_STATE_DICT: {**state, **extra}, **rest}, path)
    alone = io.BytesIO()
    torch.save({_STATE_DICT: extra, **rest}, alone)
    with path.open("r+b") as file:
        records = iter(_data_records(file))
        for tensor in tensors:
            parts = (byte_view(part) for part in tensor.parts())
            _fill(file, _next(records, tensor.key, tensor.size), parts, on_bytes)
        with zipfile.ZipFile(alone) as archive:
            for record in _data_records(alone):
                data = archive.read(record.name)
                _fill(file, _next(records, record.name, len(data)), [memoryview(data)], on_bytes)
        assert next(records, None) is None
        file.flush()
        os.fsync(file.fileno())


def _next(records: Any, what: str, size: int) -> _Record:
    record: _Record = next(records)
    assert record.size == size, f"{what} has {size} bytes, its record {record.size}"
    return record


def _fill(
    file: BinaryIO,
    record: _Record,
    parts: Iterable[memoryview],
    on_bytes: Callable[[int], None] | None,
) -> None:
    file.seek(record.begin)
    crc = written = 0
    for part in parts:
        file.write(part)
        crc = zlib.crc32(part, crc)
        written += len(part)
        if on_bytes is not None:
            on_bytes(len(part))
    if written != record.size:
        raise CheckpointError(
            f"{record.name}: expected a tensor of {record.size} bytes, got {written}."
        )
    for position in record.checksums:
        file.seek(position)
        file.write(crc.to_bytes(4, "little"))


def _data_records(file: Any) -> list[_Record]:
    """The records ``data/0``, ``data/1``, ... of an archive, in this order."""
    records = {}
    with zipfile.ZipFile(file) as archive:
        entry = archive.start_dir
        for info in archive.infolist():
            head = _at(file, info.header_offset, _LOCAL_HEADER)
            begin = info.header_offset + _LOCAL_HEADER
            begin += int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            central = _at(file, entry, _CENTRAL_HEADER)
            checksums = info.header_offset + _CRC_IN_LOCAL, entry + _CRC_IN_CENTRAL
            _, folder, number = info.filename.rpartition("/data/")
            if folder and number.isdecimal():
                records[int(number)] = _Record(info.filename, begin, info.file_size, checksums)
            entry += _CENTRAL_HEADER
            entry += sum(int.from_bytes(central[i : i + 2], "little") for i in (28, 30, 32))
    return [records[number] for number in sorted(records)]


def _at(file: Any, position: int, size: int) -> bytes:
    file.seek(position)
    data: bytes = file.read(size)
    return data
