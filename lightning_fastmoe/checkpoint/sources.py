"""A checkpoint directory as a source for :func:`~lightning_fastmoe.checkpoint.loading.load`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_fastmoe.checkpoint.manifest import Topology
from lightning_fastmoe.checkpoint.reader import CheckpointReader
from lightning_fastmoe.checkpoint.records import TensorRecord


class DirectorySource:
    """What :class:`~lightning_fastmoe.checkpoint.reader.CheckpointReader` reads.

    Args:
        reader: of the directory; closed by its owner.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self.path: Path = reader.path

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Name -> dtype and shape."""
        return self.reader.manifest.tensors

    @property
    def topology(self) -> Topology | None:
        """Of the run that saved."""
        return self.reader.manifest.topology

    @property
    def contents(self) -> tuple[str, ...]:
        """ "weights", "optimizer"."""
        return self.reader.manifest.contents

    @property
    def excluded(self) -> tuple[str, ...]:
        """Parameters that were left out on purpose."""
        return self.reader.manifest.excluded

    @property
    def moe_layers(self) -> Mapping[str, int]:
        """Layer name -> num_experts."""
        return self.reader.manifest.moe_layers

    def check(self, rank: int, world_size: int, contents: Iterable[str]) -> None:
        """Verifies this rank's share of the files: each file is read by one rank."""
        wanted = tuple(contents)
        left_out = () if "optimizer" in wanted else ("optimizer_",)
        files = self.reader.manifest.files
        loads = [0] * world_size
        own = []
        for name in sorted(files, key=lambda n: (-files[n].size, n)):
            if not name.startswith(left_out):
                lightest = loads.index(min(loads))
                loads[lightest] += files[name].size
                if lightest == rank:
                    own.append(name)
        self.reader.verify(own)

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on."""
        self.reader.read_into(tensor, start, out)

    def read_state(self, *, trusted: bool = False) -> dict[str, Any]:
        """The content of ``state.json``."""
        return self.reader.read_state(trusted=trusted)

    def read_rank_state(self, rank: int, *, trusted: bool = False) -> dict[str, Any] | None:
        """What a rank kept for itself."""
        return self.reader.read_rank_state(rank, trusted=trusted)
