"""Streams tensors from a checkpoint into other files, through one small buffer each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.files import BUFFER_BYTES
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment, chunks


def copied_fragment(
    reader: CheckpointReader, name: str, record: TensorRecord, start: int, stop: int
) -> OwnedFragment:
    """A fragment of a tensor, read from another checkpoint while it is written."""
    return OwnedFragment(
        start,
        stop - start,
        tensor=name,
        shape=record.shape,
        dtype=DTYPES[record.dtype],
        parts=lambda: read_parts(reader, name, start, stop),
    )


def read_parts(
    reader: CheckpointReader,
    tensor: str,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Reads a range of a tensor's elements, in parts of at most 4 MiB that share one buffer.

    Args:
        reader: the checkpoint.
        tensor: name of the tensor in the manifest.
        start: first element, in row-major order.
        stop: one past the last element; None for the tensor's end.
        dtype: dtype to convert to; None keeps the stored one.
    """
    record = reader.record(tensor)
    stop = record.numel if stop is None else stop
    dtype = dtype or DTYPES[record.dtype]
    step = BUFFER_BYTES // dtype.itemsize
    buffer = torch.empty(min(step, stop - start), dtype=dtype)
    for begin, end in chunks(start, stop, step):
        part = buffer[: end - begin]
        reader.read_into(tensor, begin, part)
        yield part


def stored_tensor(
    reader: CheckpointReader,
    name: str,
    record: TensorRecord,
    key: str,
    dtype: torch.dtype | None,
) -> StreamedTensor:
    """A whole tensor, read from a checkpoint while it is written to another file."""
    target = target_dtype(DTYPES[record.dtype], dtype)
    return StreamedTensor(key, target, record.shape, lambda: read_parts(reader, name, dtype=target))


def target_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The wanted dtype for a floating-point tensor; the stored one otherwise."""
    return wanted if wanted is not None and stored.is_floating_point else stored
