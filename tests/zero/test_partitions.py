"""Fragments of parameters that ZeRO 3 partitions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_fastmoe.zero.state import partition_of


@pytest.mark.parametrize(
    ("numel", "ranks", "fragments"),
    [
        (10, 4, [(0, 3), (3, 3), (6, 3), (9, 1)]),
        (2, 4, [(0, 1), (1, 1), (2, 0), (2, 0)]),  # fewer elements than ranks
        (9, 4, [(0, 3), (3, 3), (6, 3), (9, 0)]),
        (8, 1, [(0, 8)]),
    ],
)
def test_partitions_without_padding(numel, ranks, fragments):
    found = [
        partition_of(
            SimpleNamespace(
                partition_numel=lambda: -(-numel // ranks),
                ds_zero_partition_rank=rank,
                ds_numel=numel,
            )
        )
        for rank in range(ranks)
    ]
    assert [(one.start, one.length) for one in found] == fragments
