"""Copies from host memory that CUDA can't read by itself, through buffers that it can.

The driver would do that, too, on one core. Here all of the process's cores copy a piece into one
buffer while the link takes the other one's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECE = 32 << 20
"""Bytes of a buffer: large beside what starting a copy costs, small beside a layer."""


class BounceBuffers:
    """Two buffers of pinned memory that copies to one device pass through in turn.

    Args:
        device: what is copied to.
        piece: bytes of each.

    Raises:
        RuntimeError: if there is no pinned memory either.
    """

    def __init__(self, device: torch.device, piece: int = PIECE) -> None:
        pin = device.type == "cuda"
        self._buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._emptied: list[Any] = [torch.cuda.Event() if pin else None for _ in range(2)]
        self._next = 0

    def copy(self, into: Tensor, host: Tensor) -> None:
        """Copies in the current stream. The host waits until it has copied all but two pieces.

        Args:
            into: on the device, contiguous.
            host: of its shape and dtype, contiguous. It may be written to once this returns.
        """
        to, source = (t.detach().view(-1).view(torch.uint8) for t in (into, host))
        size = self._buffers[0].numel()
        for piece, part in zip(to.split(size), source.split(size), strict=True):
            buffer, emptied = self._buffers[self._next], self._emptied[self._next]
            self._next = 1 - self._next
            if emptied is not None:
                emptied.synchronize()
            buffer[: part.numel()].copy_(part)
            piece.copy_(buffer[: part.numel()], non_blocking=True)
            if emptied is not None:
                emptied.record()
