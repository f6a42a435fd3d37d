"""The tests of ops and nn rest on this fixture, so it is tested as well."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    "create",
    [
        lambda: torch.empty(3, 2),
        lambda: torch.empty_like(torch.zeros(3, 2)),
        lambda: torch.zeros(1).new_empty((3, 2)),
    ],
    ids=["empty", "empty_like", "new_empty"],
)
def test_fresh_memory_is_nan(create):
    assert create().isnan().all()


def test_fresh_indices_are_out_of_range():
    ids = torch.empty_like(torch.zeros(4, dtype=torch.long))
    with pytest.raises(IndexError):
        torch.zeros(4)[ids]
