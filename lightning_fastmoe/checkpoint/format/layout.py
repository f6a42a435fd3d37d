"""Divides a rank's state into files: enough to hash on several cores, few enough for file systems.

The layout depends only on the state and the number of ranks, never on the machine: the same state
gives the same files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.format.tensor_names import OPTIMIZER, WEIGHTS, split_name

MIN_FILE_BYTES = 64 * 2**20
"""Minimum size of a file: hashing less takes no longer than creating a file on a network disk."""

MAX_FILES = 8
MAX_FILES_OF_ALL = 1024

_WHOLE = 2**20
"""Fragments of fewer bytes are not split."""


def files_per_rank(world_size: int) -> int:
    """About how many files a rank writes; fewer on many ranks, which have many files anyway."""
    return max(1, min(MAX_FILES, MAX_FILES_OF_ALL // world_size))


def divide(
    fragments: Sequence[OwnedFragment], rank: int, max_files: int
) -> dict[str, list[OwnedFragment]]:
    """File name -> its fragments, in the given order. Files of a kind are about equally large.

    Args:
        fragments: fragments that the rank owns; those in memory may be split.
        rank: the rank, for the names of the files.
        max_files: maximum number of files; may be exceeded by one, as weights and the rest never
            share a file.
    """
    kinds: dict[str, list[OwnedFragment]] = {}
    for kind, wanted in ((WEIGHTS, True), (OPTIMIZER, False)):
        own = [f for f in fragments if (split_name(f.tensor)[0] is None) == wanted]
        if own:
            kinds[kind] = own
    total = sum(fragment.size for fragment in fragments)
    target = max(MIN_FILE_BYTES, math.ceil(total / max_files))
    result: dict[str, list[OwnedFragment]] = {}
    for kind, own in kinds.items():
        count = max(1, math.ceil(sum(fragment.size for fragment in own) / target))
        parts = [part for part in _cut(own, count if max_files > 1 else 1) if part]
        for i, part in enumerate(parts):
            number = f"_{i}" if len(parts) > 1 else ""
            result[f"{kind}_{rank:05d}{number}.safetensors"] = part
    return result


def _cut(fragments: Sequence[OwnedFragment], count: int) -> list[list[OwnedFragment]]:
    """Divides fragments into ``count`` lists of about equally many bytes."""
    total = sum(fragment.size for fragment in fragments)
    result: list[list[OwnedFragment]] = [[] for _ in range(count)]
    position = 0
    for fragment in fragments:
        for part in _cut_fragment(fragment, position, total, count):
            # To the list whose range of bytes contains the part's middle.
            middle = position + part.size // 2
            result[min(count - 1, middle * count // max(1, total))].append(part)
            position += part.size
    return result


def _cut_fragment(
    fragment: OwnedFragment, position: int, total: int, count: int
) -> Iterator[OwnedFragment]:
    """Splits a fragment that begins at byte ``position`` at the boundaries of the lists."""
    if fragment.data is None or fragment.size < _WHOLE:
        yield fragment
        return
    begin, itemsize = 0, fragment.dtype.itemsize
    for i in range(1, count + 1):
        end = min(fragment.length, max(begin, (i * total // count - position) // itemsize))
        end = fragment.length if i == count else end
        if begin < end:
            part = fragment.data[begin:end]
            yield OwnedFragment.of(fragment.tensor, fragment.shape, fragment.start + begin, part)
        begin = end
