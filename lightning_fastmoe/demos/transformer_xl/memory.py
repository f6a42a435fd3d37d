"""What a model remembers of the segments before: hidden states, without their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError


class Memory:
    """Segment-level memory (Dai et al. 2019): each layer's inputs at the last ``length`` positions.

    Not a buffer of the model: each rank has its own streams of text, so each has its own memory,
    and a checkpoint holds one copy of a buffer. A loader saves it, see
    :class:`~lightning_fastmoe.demos.transformer_xl.SegmentLoader`.

    Args:
        length: positions that are remembered; 0 remembers nothing.

    Attributes:
        layers: per layer (batch, M, d_model), M <= ``length``; empty at the start of a stream.

    Raises:
        ConfigError: if ``length`` is negative.
    """

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ConfigError(f"mem_len is {length}; it must be 0 (no memory) or more.")
        self.length = length
        self.layers: list[Tensor] = []

    def reset(self) -> None:
        """Forgets everything, as at the start of a stream."""
        self.layers = []

    @torch.no_grad()
    def append(self, hidden: Sequence[Tensor]) -> None:
        """Adds a segment and forgets what is further back than ``length``.

        Args:
            hidden: the inputs of each layer, (batch, L, d_model); the graph is cut here.
        """
        if self.length == 0:
            return
        before = self.layers or [states[:, :0] for states in hidden]
        self.layers = [
            torch.cat((old.to(new), new), dim=1)[:, -self.length :]
            for old, new in zip(before, hidden, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Copies on the CPU, for a checkpoint."""
        return {"layers": [states.cpu().clone() for states in self.layers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; a shorter memory than the saved one keeps the last part."""
        self.reset()
        self.append(state["layers"])
