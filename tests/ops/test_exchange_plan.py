"""Which tokens go to which ranks, against plain loops."""

from __future__ import annotations

import pytest
import torch
from ops import ahead_cases
from ops import plan_cases as cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_what_is_sent_and_where_it_is_found(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check(case, "cpu", dtype)


@pytest.mark.parametrize("wrong", ahead_cases.WRONG)
def test_rows_read_before_the_host_knows_their_counts(wrong: str) -> None:
    ahead_cases.check(wrong, "cpu")
