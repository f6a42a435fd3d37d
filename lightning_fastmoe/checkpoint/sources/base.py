"""What loading asks of a checkpoint, whatever its files look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightning_fastmoe.checkpoint.format.manifest import Topology
from lightning_fastmoe.checkpoint.format.records import (
    TensorRecord,
)


class Source(Protocol):
    """A checkpoint that can be read by intervals, whatever its files look like."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Name -> dtype and shape."""
        ...

    @property
    def topology(self) -> Topology | None:
        """Of the run that saved, if known."""
        ...

    @property
    def contents(self) -> tuple[str, ...]:
        """ "weights", "optimizer"."""
        ...

    @property
    def excluded(self) -> tuple[str, ...]:
        """Parameters that were left out on purpose."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Further name of a parameter -> the name under which it is stored."""
        ...

    @property
    def moe_layers(self) -> Mapping[str, int]:
        """Layer name -> num_experts, as far as known."""
        ...

    def check(self, rank: int, world_size: int, contents: Iterable[str]) -> None:
        """This rank's part of verifying the files that hold ``contents``."""
        ...

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on."""
        ...

    def read_state(self, *, trusted: bool = False) -> dict[str, Any]:
        """Everything that is not a tensor; the keys of ``state.json``."""
        ...

    def read_rank_state(self, rank: int, *, trusted: bool = False) -> dict[str, Any] | None:
        """What a rank kept for itself."""
        ...
