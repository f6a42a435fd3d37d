"""Which files a rank writes: enough for several cores to hash, few enough for a file system.

What goes where depends on the state and the number of ranks alone, never on the machine: the same
state gives the same files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_fastmoe.checkpoint.format.records import OPTIMIZER, WEIGHTS, split_name
from lightning_fastmoe.checkpoint.format.shards import OwnedPiece

MIN_FILE_BYTES = 64 * 2**20
"""Less is hashed in the time that a network file system needs to make a file."""

MAX_FILES = 8
MAX_FILES_OF_ALL = 1024

_WHOLE = 2**20
"""Pieces of fewer bytes are not cut."""


def files_per_rank(world_size: int) -> int:
    """Into about how many files a rank divides its state; many ranks have many files anyway."""
    return max(1, min(MAX_FILES, MAX_FILES_OF_ALL // world_size))


def divide(pieces: Sequence[OwnedPiece], rank: int, max_files: int) -> dict[str, list[OwnedPiece]]:
    """File name -> the pieces in it, in the order given. Files of a kind are about equally large.

    Args:
        pieces: what the rank owns; those in memory may be cut.
        rank: names the files.
        max_files: in all, or one more: weights and the rest are never in one file.
    """
    kinds: dict[str, list[OwnedPiece]] = {}
    for kind, wanted in ((WEIGHTS, True), (OPTIMIZER, False)):
        own = [p for p in pieces if (split_name(p.tensor)[0] is None) == wanted]
        if own:
            kinds[kind] = own
    total = sum(piece.size for piece in pieces)
    target = max(MIN_FILE_BYTES, math.ceil(total / max_files))
    result: dict[str, list[OwnedPiece]] = {}
    for kind, own in kinds.items():
        count = max(1, math.ceil(sum(piece.size for piece in own) / target))
        parts = [part for part in _cut(own, count if max_files > 1 else 1) if part]
        for i, part in enumerate(parts):
            number = f"_{i}" if len(parts) > 1 else ""
            result[f"{kind}_{rank:05d}{number}.safetensors"] = part
    return result


def _cut(pieces: Sequence[OwnedPiece], count: int) -> list[list[OwnedPiece]]:
    """Pieces in ``count`` lists of about as many bytes."""
    total = sum(piece.size for piece in pieces)
    result: list[list[OwnedPiece]] = [[] for _ in range(count)]
    position = 0
    for piece in pieces:
        for part in _cut_piece(piece, position, total, count):
            # The list in whose share of the bytes its middle lies; nothing is in the last's end.
            middle = position + part.size // 2
            result[min(count - 1, middle * count // max(1, total))].append(part)
            position += part.size
    return result


def _cut_piece(piece: OwnedPiece, position: int, total: int, count: int) -> Iterator[OwnedPiece]:
    """The piece, which begins at byte ``position``, cut where shares end."""
    if piece.data is None or piece.size < _WHOLE:
        yield piece
        return
    begin, itemsize = 0, piece.dtype.itemsize
    for share in range(1, count + 1):
        end = min(piece.length, max(begin, (share * total // count - position) // itemsize))
        end = piece.length if share == count else end
        if begin < end:
            part = piece.data[begin:end]
            yield OwnedPiece.of(piece.tensor, piece.shape, piece.start + begin, part)
        begin = end
