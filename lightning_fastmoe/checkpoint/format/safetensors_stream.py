"""Writes safetensors files as a stream.

The safetensors library needs all tensors of a file in host memory. Here they pass, from any device,
through two small buffers, and are hashed while they are written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format import files
from lightning_fastmoe.checkpoint.format.dtypes import DTYPE_NAMES
from lightning_fastmoe.checkpoint.format.files import BUFFER_BYTES
from lightning_fastmoe.checkpoint.format.records import FileRecord
from lightning_fastmoe.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header; the safetensors library refuses larger ones."""

_METADATA = {"format": "pt"}
_DIGEST = 8
_WRITEBACK_BYTES = 16 * 2**20
"""Amount that is flushed to the disk at a time; less would fragment files into more extents."""


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of a safetensors file, produced part by part while it is written.

    Attributes:
        key: its name in the file.
        dtype: the dtype of all parts.
        shape: shape in the file.
        parts: function that is called once and yields one-dimensional contiguous tensors on any
            device, which together are the tensor's elements in row-major order.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def byte_view(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(data.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_safetensors(
    path: Path,
    tensors: Sequence[StreamedTensor],
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[FileRecord, dict[str, str]]:
    """Writes a new safetensors file and waits until it is on the disk.

    Uses two buffers of 4 MiB in addition to what ``parts`` yields, whatever the size of the
    tensors. Copying, hashing, writing and flushing overlap.

    Args:
        path: must not exist.
        tensors: the tensors to write, with distinct keys.
        on_bytes: called with the number of bytes after each write, for progress bars.

    Returns:
        (the file, key -> digest: first hexadecimal digits of the SHA-256 of the file up to the end
        of that tensor)

    Raises:
        OSError: naming the file, if it can't be written.
        CheckpointError: if a dtype can't be stored.
    """
    # Larger elements first, so that every tensor is aligned to its element size.
    ordered = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    header = _header(ordered, path)
    stream = _Stream(path, on_bytes)
    try:
        stream.put([torch.frombuffer(bytearray(header), dtype=torch.uint8)], len(header))
        for tensor in ordered:
            stream.put(tensor.parts(), tensor.size)
        record = stream.finish()
    except OSError as error:
        error.filename = error.filename or str(path)  # os.write and os.fsync don't know the name
        raise
    finally:
        stream.close()
    return record, dict(zip((t.key for t in ordered), stream.digests[1:], strict=True))


def _header(tensors: Sequence[StreamedTensor], path: Path) -> bytes:
    entries: dict[str, Any] = {"__metadata__": _METADATA}
    position = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{path}: {tensor.key!r} has dtype {tensor.dtype}, which safetensors files can't"
                f" hold. Convert it to one of {', '.join(map(str, DTYPE_NAMES))}."
            )
        if tensor.key in entries:
            raise CheckpointError(f"{path}: {tensor.key!r} would be written twice.")
        entries[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} would have a header of {len(text)} bytes for {len(tensors)} tensors, more than"
            f" the {MAX_HEADER_BYTES} of the safetensors format. Write several files."
        )
    return len(text).to_bytes(8, "little") + text


class _Stream:
    """Copies, hashes and writes through two alternating buffers."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None] | None) -> None:
        self.path, self.on_bytes = path, on_bytes
        self.digests: list[str] = []
        self._fd = files.create(path)
        # Not pinned: copies from CUDA would be faster, but pinning takes time, and the disk is the
        # bottleneck anyway.
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(2)]
        self._used = 0
        self._ends: list[int] = []  # offsets at which tensors end in the buffer being filled
        self._size = self._reported = self._sent = 0
        self._hash = hashlib.sha256()
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        self._pending: list[Any] = []

    def put(self, parts: Iterable[Tensor], size: int) -> None:
        """Writes a tensor of ``size`` bytes."""
        begin = self._size + self._used
        for part in parts:
            self._fill(part.detach())
        if (found := self._size + self._used - begin) != size:
            raise CheckpointError(f"{self.path}: expected a tensor of {size} bytes, got {found}.")
        self._ends.append(self._used)

    def _fill(self, data: Tensor) -> None:
        size = data.element_size()
        done = 0
        while done < data.numel():
            if self._used == BUFFER_BYTES:
                self._flush()
            count = min(data.numel() - done, (BUFFER_BYTES - self._used) // size)
            end = self._used + count * size
            self._copy(data[done : done + count], self._buffers[0][self._used : end])
            self._used, done = end, done + count

    @staticmethod
    def _copy(data: Tensor, target: Tensor) -> None:
        if data.device.type == "cpu":
            # Not by torch, which would start a pool of threads for each of the many threads here.
            np.copyto(target.numpy(), data.view(torch.uint8).numpy())
        else:
            target.view(data.dtype).copy_(data)

    def _flush(self) -> None:
        self._settle()  # the other buffer is free again
        view = byte_view(self._buffers[0])[: self._used]
        ends, self._ends = self._ends, []
        self._pending = [
            self._workers.submit(self._digest, view, ends),
            self._workers.submit(self._write, view, self._size + self._used),
        ]
        self._size += self._used
        self._used = 0
        self._buffers.reverse()

    def _digest(self, view: memoryview, ends: list[int]) -> None:
        position = 0
        for end in ends:
            self._hash.update(view[position:end])
            self.digests.append(self._hash.copy().hexdigest()[:_DIGEST])
            position = end
        self._hash.update(view[position:])

    def _write(self, view: memoryview, end: int) -> None:
        files.write_all(self._fd, view)
        if end - self._sent >= _WRITEBACK_BYTES:
            files.start_writeback(self._fd, self._sent, end - self._sent)
            self._sent = end

    def _settle(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        if pending and self.on_bytes is not None:
            self.on_bytes(self._size - self._reported)
            self._reported = self._size

    def finish(self) -> FileRecord:
        """Waits until the file is on the disk, and returns its record."""
        self._flush()
        self._settle()
        os.fsync(self._fd)
        return FileRecord(self._size, self._hash.hexdigest())

    def close(self) -> None:
        self._workers.shutdown(wait=True)
        os.close(self._fd)
