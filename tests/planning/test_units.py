"""Numbers for people never round to nothing."""

from __future__ import annotations

import pytest

from lightning_fastmoe.planning.units import bytes_text, count_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 GB"),
        (1, "1 B"),
        (49, "49 B"),
        (50, "0.1 KB"),
        (49_999, "50.0 KB"),
        (50_000, "0.1 MB"),
        (49_999_999, "50.0 MB"),
        (50_000_000, "0.1 GB"),
        (24e9, "24.0 GB"),
    ],
)
def test_bytes(size: float, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1000, "1.00 k"), (2_500_000, "2.50 M"), (1_040_000_000, "1.04 B")],
)
def test_counts(number: int, text: str) -> None:
    assert count_text(number) == text
