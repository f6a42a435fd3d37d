"""Rows for several ranks, and where plain loops put them: for the twins, and for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.ops import exchange


@dataclass(frozen=True)
class Case:
    """Rows to send.

    Attributes:
        counts: rows for each rank.
        width: elements of a row.
        dtype: of the rows.
        divisor: with one, rows are named by an order; None sends the rows themselves.
        rank: who sends.
    """

    counts: tuple[int, ...]
    width: int
    dtype: torch.dtype
    divisor: int | None
    rank: int = 0


CASES = [
    Case((3, 5), 8, torch.float32, 2),
    Case((3, 5), 8, torch.float32, None, rank=1),
    Case((0, 7, 0, 2), 33, torch.bfloat16, 4, rank=2),  # words of two bytes
    Case((0, 0, 0), 4, torch.float64, 3),
    Case((70, 0, 41), 520, torch.bfloat16, 3, rank=1),
    Case((1,), 1, torch.uint8, 1),
    Case((900, 1100), 1024, torch.bfloat16, 2, rank=1),
    Case((129, 4, 300, 77), 3, torch.uint8, None, rank=3),
    Case((20, 10), 3, torch.int32, 1),
]

AT = 4 * exchange.ALIGNMENT


def inputs(case: Case) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows, order and ends."""
    generator = torch.Generator().manual_seed(sum(case.counts))
    total = sum(case.counts)
    ends = torch.tensor(case.counts).cumsum(0).to(torch.int32)
    if case.divisor is None:
        rows = torch.randint(100, (total, case.width), generator=generator).to(case.dtype)
        return rows, None, ends
    pairs = total + 3  # some are not sent
    order = torch.randperm(pairs, generator=generator)
    tokens = -(-pairs // case.divisor)
    rows = torch.randint(100, (tokens, case.width), generator=generator).to(case.dtype)
    return rows, order, ends


def memory(case: Case) -> list[Tensor]:
    """Of each rank, with room for the rows and a margin."""
    row = case.width * torch.empty(0, dtype=case.dtype).element_size()
    size = AT + -(-max(case.counts) * row // 16) * 16 + 64
    return [torch.full((size,), 7, dtype=torch.uint8) for _ in case.counts]


def expected(case: Case) -> list[Tensor]:
    """What each rank's memory holds then."""
    rows, order, _ = inputs(case)
    filled = memory(case)
    i = 0
    for rank, count in enumerate(case.counts):
        at = AT
        for _ in range(count):
            row = i if order is None else int(order[i]) // int(case.divisor or 1)
            sent = rows[row].view(torch.uint8)
            filled[rank][at : at + len(sent)] = sent
            at += len(sent)
            i += 1
    return filled
