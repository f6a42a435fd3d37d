"""A record of a rank's current token exchange that other processes can read."""

from __future__ import annotations

import struct
import time
from typing import Any

EXCHANGE = struct.Struct("<Qd?240s")
"""The record: number, start time (``time.monotonic``), whether it is pending, and its name."""

_PENDING_AT = struct.calcsize("<Qd")


class PendingExchange:
    """The exchange that this rank is in, or was in last.

    Costs two writes of a few bytes per exchange. The memory may be shared with a process that
    reports the record when this one can't, because its main thread holds the GIL while it waits for
    another rank.

    On CUDA, this record considers an exchange finished once it is enqueued; waiting for it shows in
    the next layer's counts, which the host reads.

    Args:
        memory: writable buffer; a private one by default.
        offset: start of the record in ``memory``.

    Attributes:
        number: exchanges started so far.
    """

    def __init__(self, memory: Any = None, offset: int = 0) -> None:
        self._memory = bytearray(EXCHANGE.size) if memory is None else memory
        self._offset = offset
        self.number = 0
        self._next = b""
        self._names: dict[tuple[str, str], bytes] = {}

    def __call__(self, layer: str, phase: str) -> PendingExchange:
        """Returns a context manager for an exchange, in which this rank waits for others.

        Args:
            layer: the layer's name.
            phase: what is exchanged.
        """
        name = self._names.get((layer, phase))
        if name is None:
            name = self._names[layer, phase] = f"{layer}, phase {phase}".encode()[:240]
        self._next = name
        return self

    def __enter__(self) -> None:
        self.number += 1
        EXCHANGE.pack_into(
            self._memory, self._offset, self.number, time.monotonic(), True, self._next
        )

    def read(self) -> tuple[int, bool, str]:
        """Number of the exchange, whether this rank is in it, and its name; from any thread."""
        number, _, pending, name = EXCHANGE.unpack_from(self._memory, self._offset)
        return number, pending, name.rstrip(b"\0").decode(errors="replace")

    def __exit__(self, *error: object) -> None:
        self._memory[self._offset + _PENDING_AT] = 0
