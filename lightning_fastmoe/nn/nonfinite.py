"""Detects NaN and Inf in a router's logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_fastmoe.errors import NonFiniteError

NonFinitePolicy = Literal["raise", "collect", "ignore"]


class NonFiniteGuard:
    """Looks for NaN and Inf in the logits of each forward pass.

    Attributes:
        policy: "raise" an error, on the CPU; "collect" them in training, for whoever calls
            :meth:`take` after the step; or "ignore" them.
    """

    def __init__(self) -> None:
        self.policy: NonFinitePolicy = "raise"
        self._seen: Tensor | None = None

    def look(self, logits: Tensor, layer: str, *, training: bool) -> None:
        """Checks ``logits`` and acts according to :attr:`policy`; no host synchronisation on CUDA.

        Args:
            logits: (T, E).
            layer: the layer's name, for the error.
            training: whether the layer is training.

        Raises:
            NonFiniteError: on the CPU, under the policy "raise".
        """
        if self.policy == "ignore":
            return
        bad = ~torch.isfinite(logits.detach()).all()
        if self.policy == "collect":
            if training:
                self._seen = bad if self._seen is None else self._seen | bad
        elif logits.device.type == "cpu" and bool(bad):
            # On CUDA, reading the flag would stall the stream; there the strategy collects it.
            raise NonFiniteError(
                f"{layer}: the router's logits contain NaN or Inf, so its input or its weights"
                " do. Lower the learning rate or look for the bad batch; set the layer's"
                " nonfinite_policy='ignore' to continue anyway."
            )

    @property
    def found(self) -> bool:
        """Whether any was collected since the last :meth:`take`; reads it from the device."""
        return self._seen is not None and bool(self._seen)

    def put(self) -> None:
        """Restores the flag from a checkpoint that was saved in the middle of a step."""
        self._seen = torch.ones((), dtype=torch.bool)

    def take(self, device: torch.device) -> Tensor:
        """Whether any was collected since the last call: an int32 scalar, 1 or 0, on ``device``."""
        seen, self._seen = self._seen, None
        if seen is None:
            return torch.zeros((), dtype=torch.int32, device=device)
        return seen.to(device=device, dtype=torch.int32)
