"""What the benchmarks refuse."""

from __future__ import annotations


class BenchmarkError(Exception):
    """An option or a combination that can't be measured; the message says what to do."""
