"""Numbers of bytes and of parameters for people."""

from __future__ import annotations


def bytes_text(size: float) -> str:
    """Bytes, as ``"24.0 GB"``; in a smaller unit where that would round to zero."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size == 0 or size >= scale / 20:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def count_text(number: int) -> str:
    """A number of parameters, as ``"1.04 B"``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return str(number)
