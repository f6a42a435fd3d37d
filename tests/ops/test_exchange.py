"""What ranks do to each other's memory, on the CPU."""

from __future__ import annotations

import pytest
import torch
from ops import exchange_cases as cases

from lightning_fastmoe.ops import exchange, kernels

pytestmark = pytest.mark.poisoned(False)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_rows_go_where_the_senders_counts_say(case):
    rows, order, ends = cases.inputs(case)
    memory = cases.memory(case)
    most = max(case.counts)
    exchange.push_rows(rows, order, ends, case.divisor or 1, memory, case.rank, cases.AT, most)
    for found, right in zip(memory, cases.expected(case), strict=True):
        assert torch.equal(found, right)


def test_rows_that_there_is_no_room_for_are_refused():
    rows, order, ends = cases.inputs(cases.CASES[0])
    memory = cases.memory(cases.CASES[0])
    with pytest.raises(AssertionError):
        exchange.push_rows(rows, order, ends, 2, memory, 0, cases.AT, 4)


def test_each_rank_has_a_flag_of_its_own_in_every_rank():
    memory = [torch.zeros(2 * 3 * exchange.FLAG_BYTES, dtype=torch.uint8) for _ in range(3)]
    at = 3 * exchange.FLAG_BYTES
    exchange.set_flags(memory, 1, at, 5 << exchange.TAG_BITS)
    for own in memory:
        assert exchange.flags_of(own, 0, 3).tolist() == [0, 0, 0]
        assert exchange.flags_of(own, at, 3).tolist() == [0, 5 << exchange.TAG_BITS, 0]


def test_a_rank_that_has_given_up_sets_no_other_flag():
    """What it pushes after a wait that has failed is not what others wait for."""
    memory = [torch.zeros(2 * 3 * exchange.FLAG_BYTES, dtype=torch.uint8) for _ in range(3)]
    at = 3 * exchange.FLAG_BYTES
    exchange.set_flags(memory, 1, exchange.GIVEN_UP_AT, 1)
    for rank in (0, 1):
        exchange.set_flags(memory, rank, at, 5)
    for own in memory:
        assert exchange.flags_of(own, exchange.GIVEN_UP_AT, 3).tolist() == [0, 1, 0]
        assert exchange.flags_of(own, at, 3).tolist() == [5, 0, 0]


@pytest.mark.parametrize(
    ("flags", "missing", "different"),
    [
        ([(3, 9), (3, 9)], 0b00, 0b00),
        ([(2, 9), (3, 9)], 0b01, 0b00),
        ([(3, 9), (3, 8)], 0b10, 0b10),
        ([(4, 9), (0, 0)], 0b11, 0b01),
    ],
)
def test_flags_are_there_missing_or_of_another_exchange(flags, missing, different):
    found = torch.tensor([number << exchange.TAG_BITS | tag for number, tag in flags])
    value = 3 << exchange.TAG_BITS | 9
    assert exchange.compare_flags(found, value) == (missing, different)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_of_rows_among_rows_of_nobody(dtype):
    ranks, tokens, most = 3, 4, 9
    rows = torch.full((ranks * most, 40), torch.nan, dtype=dtype)
    places = torch.full((tokens, ranks), -1)
    right = torch.zeros(tokens, 40, dtype=torch.float64)
    for token, rank, slot in ((0, 0, 0), (0, 2, 1), (1, 1, 5), (3, 0, 1), (3, 1, 8), (3, 2, 0)):
        rows[rank * most + slot] = torch.randn(40)
        places[token, rank] = rank * most + slot
        right[token] += rows[rank * most + slot].double()
    found = kernels.sum_placed_rows(rows, places.view(-1), ranks).cpu()
    assert found.dtype == dtype
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), right, rtol=bound, atol=bound)
