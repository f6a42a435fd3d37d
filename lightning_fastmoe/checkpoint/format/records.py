"""The manifest's records of files and tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES, itemsize
from lightning_fastmoe.checkpoint.format.fragment import StoredFragment
from lightning_fastmoe.checkpoint.format.tensor_names import TENSOR_NAME
from lightning_fastmoe.errors import CheckpointError

MAX_NUMEL = 2**60
MAX_DIMENSIONS = 64
MAX_NAME = 4096
"""Maximum length of a tensor's name in characters; real names are far shorter."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Surrogates, which JSON can escape but UTF-8 can't encode."""


@dataclass(frozen=True)
class FileRecord:
    """A file: its size in bytes and the SHA-256 of all of them, in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of the canonical state.

    Attributes:
        dtype: a key of :data:`DTYPES`.
        shape: shape of the whole tensor; stacked experts have ``num_experts`` first.
        fragments: fragments sorted by start; together they cover every element exactly once.
    """

    dtype: str
    shape: tuple[int, ...]
    fragments: tuple[StoredFragment, ...]

    @property
    def pieces(self) -> tuple[StoredFragment, ...]:
        """The former name of :attr:`fragments`."""
        return self.fragments

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True)
class WrittenFragment:
    """A fragment that some rank has written, to be listed in the manifest."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    fragment: StoredFragment


def check_tensor(name: str, dtype: str, shape: tuple[int, ...], where: object) -> None:
    """Refuses names, dtypes and shapes that this package never writes.

    Raises:
        CheckpointError: naming the tensor.
    """
    if len(name) > MAX_NAME or not TENSOR_NAME.fullmatch(name) or _SURROGATE.search(name):
        raise CheckpointError(
            f"{where}: {name[:200]!r} is not a tensor name: expected weights/NAME,"
            f" optimizer/STATE/NAME or gradients/KIND/NAME, of at most {MAX_NAME} Unicode"
            " characters."
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: tensor {name!r} has dtype {dtype[:40]!r}, which is not one of"
            f" {', '.join(DTYPES)}. It may come from a newer version."
        )
    sane = len(shape) <= MAX_DIMENSIONS and all(0 <= d <= MAX_NUMEL for d in shape)
    if not sane or math.prod(shape) > MAX_NUMEL:
        raise CheckpointError(
            f"{where}: tensor {name!r} has an invalid shape, {str(list(shape)[:9])[:200]}."
        )


def check_coverage(name: str, record: TensorRecord, where: object) -> None:
    """Checks that every element of the tensor is in exactly one fragment.

    Raises:
        CheckpointError: naming the tensor, the gap or overlap, and the file.
    """
    position = 0
    for fragment in record.fragments:
        if fragment.length < 1:
            raise CheckpointError(
                f"{where}: tensor {name!r} has a fragment of {fragment.length} elements in"
                f" {fragment.file}."
            )
        if fragment.start > position:
            raise CheckpointError(
                f"{where}: elements {position} to {fragment.start} of tensor {name!r} with shape"
                f" {list(record.shape)} are not in any file: the checkpoint is incomplete."
            )
        if fragment.start < position:
            raise CheckpointError(
                f"{where}: elements from {fragment.start} on of tensor {name!r} occur twice, the"
                f" second time in {fragment.file}: the checkpoint is inconsistent."
            )
        position = fragment.stop
    if position != record.numel:
        what = "are missing" if position < record.numel else "exceed its size"
        raise CheckpointError(
            f"{where}: tensor {name!r} has shape {list(record.shape)}, {record.numel} elements, but"
            f" its fragments end at {position}: elements {what}."
        )


def merge(written: Iterable[WrittenFragment], where: object) -> dict[str, TensorRecord]:
    """Merges the fragments of all ranks into tensors.

    Raises:
        CheckpointError: if ranks disagree about a tensor, or its fragments don't cover it exactly.
    """
    about: dict[str, tuple[str, tuple[int, ...]]] = {}
    fragments: dict[str, list[StoredFragment]] = {}
    for one in written:
        known = about.setdefault(one.tensor, (one.dtype, one.shape))
        if known != (one.dtype, one.shape):
            raise CheckpointError(
                f"{where}: ranks disagree about tensor {one.tensor!r}: dtype and shape {known} and"
                f" {(one.dtype, one.shape)}."
            )
        own = fragments.setdefault(one.tensor, [])
        if one.fragment.length:  # a tensor without elements has no fragments
            own.append(one.fragment)
    records = {}
    for name, (dtype, shape) in sorted(about.items()):
        check_tensor(name, dtype, shape, where)
        records[name] = TensorRecord(dtype, shape, tuple(sorted(fragments[name])))
        check_coverage(name, records[name], where)
    return records
