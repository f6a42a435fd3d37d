"""The interface that loading needs from a checkpoint of any kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightning_fastmoe.checkpoint.format.manifest import Topology
from lightning_fastmoe.checkpoint.format.records import TensorRecord


class Source(Protocol):
    """A checkpoint of any kind whose tensors can be read fragment by fragment."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Name -> dtype and shape."""
        ...

    @property
    def topology(self) -> Topology | None:
        """The topology of the run that saved, if known."""
        ...

    @property
    def contents(self) -> tuple[str, ...]:
        """What the checkpoint holds: "weights" and perhaps "optimizer"."""
        ...

    @property
    def excluded(self) -> tuple[str, ...]:
        """Parameters that were deliberately not saved."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Further name of a parameter -> the name under which it is stored."""
        ...

    @property
    def moe_layers(self) -> Mapping[str, int]:
        """Layer name -> num_experts, for the layers for which it is known."""
        ...

    def check(self, rank: int, world_size: int, contents: Iterable[str]) -> None:
        """Verifies this rank's share of the files that hold ``contents``."""
        ...

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on."""
        ...

    def read_state(self, *, trusted: bool = False) -> dict[str, Any]:
        """Everything that is not a tensor, with the keys of ``state.json``."""
        ...

    def read_rank_state(self, rank: int, *, trusted: bool = False) -> dict[str, Any] | None:
        """The state that only this rank saved; None if there is none."""
        ...
