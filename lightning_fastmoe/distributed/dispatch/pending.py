"""Where a rank is in its exchanges of tokens, written down so that another process can read it."""

from __future__ import annotations

import struct
import time
from typing import Any

EXCHANGE = struct.Struct("<Qd?240s")
"""The record: number, when it began (``time.monotonic``), whether it is pending, and its name."""

_PENDING_AT = struct.calcsize("<Qd")


class PendingExchange:
    """The exchange that this rank is in, or was in last.

    Two writes of a few bytes per exchange. The memory may be shared with a process that reports
    them when this one can't, because its main thread waits for another rank and holds the GIL.

    On CUDA an exchange is over, for this record, when it is enqueued; the wait for it shows in the
    counts of the next layer, which the host reads.

    Args:
        memory: writable buffer; a private one by default.
        offset: where the record begins in ``memory``.

    Attributes:
        number: exchanges begun so far.
    """

    def __init__(self, memory: Any = None, offset: int = 0) -> None:
        self._memory = bytearray(EXCHANGE.size) if memory is None else memory
        self._offset = offset
        self.number = 0
        self._next = b""
        self._names: dict[tuple[str, str], bytes] = {}

    def __call__(self, layer: str, phase: str) -> PendingExchange:
        """A context in which this rank waits for others.

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
