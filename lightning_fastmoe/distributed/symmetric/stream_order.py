"""Keeps exchanges in order where the user changes the CUDA stream between them."""

from __future__ import annotations

import torch


class StreamOrder:
    """Each :meth:`follow` makes the current stream wait for that of the one before.

    It costs nothing while the stream stays the same, as it nearly always does.

    Args:
        device: of the streams; nothing is done on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """What the current stream does from here on comes after what the last one has so far."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream
