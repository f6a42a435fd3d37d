"""This package's own checkpoint directories as a source to load from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_fastmoe.checkpoint.format.manifest import Topology
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import TensorRecord

_NUMBER = re.compile(r"_(\d{5})[._]")
_UNEVEN = 1.1


class DirectorySource:
    """Source for the checkpoint directories that this package writes.

    Args:
        reader: the reader of the directory; the caller closes it.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self.path: Path = reader.path

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Name -> dtype and shape."""
        return self.reader.manifest.tensors

    @property
    def topology(self) -> Topology:
        """The topology of the run that saved."""
        return self.reader.manifest.topology

    @property
    def contents(self) -> tuple[str, ...]:
        """What the checkpoint holds: "weights" and perhaps "optimizer"."""
        return self.reader.manifest.contents

    @property
    def excluded(self) -> tuple[str, ...]:
        """Parameters that were deliberately not saved."""
        return self.reader.manifest.excluded

    @property
    def tied(self) -> Mapping[str, str]:
        """Further name of a parameter -> the name under which it is stored."""
        return self.reader.manifest.tied

    @property
    def moe_layers(self) -> Mapping[str, int]:
        """Layer name -> num_experts."""
        return self.reader.manifest.moe_layers

    def check(self, rank: int, world_size: int, contents: Iterable[str]) -> None:
        """Verifies this rank's share of the files: each file is read by one rank."""
        wanted = tuple(contents)
        left_out = () if "optimizer" in wanted else ("optimizer_",)
        sizes = {
            name: record.size
            for name, record in self.reader.manifest.files.items()
            if not name.startswith(left_out)
        }
        self.reader.verify(assign_files(sizes, world_size, self.topology.world_size)[rank])

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on."""
        self.reader.read_into(tensor, start, out)

    def read_state(self, *, trusted: bool = False) -> dict[str, Any]:
        """The content of ``state.json``."""
        return self.reader.read_state(trusted=trusted)

    def read_rank_state(self, rank: int, *, trusted: bool = False) -> dict[str, Any] | None:
        """The state that only this rank saved; None if there is none."""
        return self.reader.read_rank_state(rank, trusted=trusted)


def assign_files(
    sizes: Mapping[str, int], world_size: int, saved_world_size: int
) -> list[list[str]]:
    """Divides the files to verify among the ranks.

    If the number of ranks is that of the run that saved, each rank takes the files of its own
    number: it will read them again, from its machine's page cache. If that would give one rank much
    more than the others, or the number of ranks differs, files are assigned in order of decreasing
    size, each to the rank with the fewest bytes.

    Args:
        sizes: file name -> bytes.
        world_size: number of ranks that verify.
        saved_world_size: number of ranks that wrote the files.
    """
    by_size: list[list[str]] = [[] for _ in range(world_size)]
    by_writer: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[name]
        by_size[lightest].append(name)
        number = _NUMBER.search(name)
        by_writer[int(number[1]) % world_size if number else 0].append(name)
    largest = max(sum(sizes[name] for name in own) for own in by_writer)
    if world_size == saved_world_size and largest <= _UNEVEN * max(loads):
        return by_writer
    return by_size
