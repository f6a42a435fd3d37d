"""Helpers for multi-rank tests, for this package's tests and for users."""

from lightning_fastmoe.testing.ranks import RankError, RankPool, free_port

__all__ = ["RankError", "RankPool", "free_port"]
