"""Ranks for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_fastmoe.testing import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Ranks in worker processes, started once for the whole session."""
    pool = RankPool()
    yield pool
    pool.close()
