"""Where the windows of a stream of tokens or bytes start."""

from __future__ import annotations


class WindowStarts:
    """The starts of windows of ``seq_len + 1`` items, of which the first is only an input.

    Adjacent windows share one item, so that every item but the first is a target exactly once. A
    rest that fills no window is left out.

    Args:
        length: number of items in the stream.
        seq_len: predictions per window.
        max_windows: keep this many, evenly spaced over the stream; None keeps all.
    """

    def __init__(self, length: int, seq_len: int, max_windows: int | None = None) -> None:
        self._seq_len = seq_len
        self._available = max(0, (length - 1) // seq_len)
        self._kept = min(self._available, max_windows or self._available)

    def __len__(self) -> int:
        return self._kept

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._kept:
            raise IndexError(f"window {index} of {self._kept}")
        return index * self._available // self._kept * self._seq_len
