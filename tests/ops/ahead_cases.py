"""Rows that are read before the host knows their counts: twins and kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe.ops import exchange, exchange_counts
from lightning_fastmoe.ops.exchange_arrival import Blocks, Expected, Received, receive_ahead

RANKS, RANK, SLOTS, WIDTH, MOST = 3, 1, 2, 48, 9
WHERE = torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 0, -1]])
COUNTS = (4, 0, 7)
"""Rows of each rank for this one."""
OF_EXPERTS = ((3, 1, 2, 4, 0), (9, 9, 0, 0, 9), (0, 5, 6, 3, 1))
"""Tokens of each expert, of each rank: 15 choose experts of this one."""
FLAGS = (1 << exchange.TAG_BITS, 7 << exchange.TAG_BITS | 5)

WRONG = ("nothing", "counts flag", "rows flag", "capacity", "rows", "pairs", "negative", "most")
"""What is not as expected."""


def read(wrong: str, device: str) -> Received:
    """What is read if one thing is not as expected."""
    lines = [RANKS * exchange.FLAG_BYTES * i for i in (1, 2)]
    table_at, block = lines[1] + RANKS * exchange.FLAG_BYTES, 8 * 32
    control = torch.zeros(table_at + RANKS * block, dtype=torch.uint8)
    table = exchange_counts.table(control, table_at, block, RANKS, block // 8)
    for rank in range(RANKS):
        of_ranks = [5, COUNTS[rank], 5]
        needed = 1000 if wrong != "capacity" or rank != 2 else 1001
        body = torch.tensor([*OF_EXPERTS[rank], *of_ranks, needed])
        table[rank, exchange_counts.HEADER :][: len(body)] = body
    if wrong == "negative":
        table[0, exchange_counts.HEADER + 5 + RANK] = -1
    for line, value, name in zip(lines, FLAGS, ("counts flag", "rows flag"), strict=True):
        exchange.flags_of(control, line, RANKS).fill_(value)
        if wrong == name:
            exchange.flags_of(control, line, RANKS)[2] -= 1
    sizes = [-(-MOST * width // 16) * 16 for width in (WIDTH, 8 * SLOTS)]
    memory = torch.full((16 + RANKS * sum(sizes),), 0x7F, dtype=torch.uint8)
    rows = Blocks(memory, 16, sizes[0], WIDTH)
    packed = Blocks(memory, 16 + RANKS * sizes[0], sizes[1], 8 * SLOTS)
    for rank, count in enumerate(COUNTS):
        rows.of(rank, count).copy_(_rows(rank, count))
        packed.of(rank, count).copy_(_packed(rank, count))
    expected = Expected(
        control.to(device),
        list(zip(lines, FLAGS, strict=True)),
        (table_at, block, 8 * exchange_counts.HEADER),
        WHERE.to(device),
        RANK,
        RANKS,
        1000,
        6 if wrong == "most" else MOST,
        10 if wrong == "rows" else 13,
        14 if wrong == "pairs" else 17,
    )
    there = memory.to(device)
    own = [Blocks(there, one.at, one.block_bytes, one.row_bytes) for one in (rows, packed)]
    return receive_ahead(own[0], own[1], 2, torch.float32, expected)


def _rows(rank: int, count: int) -> Tensor:
    return (100 * rank + torch.arange(count * WIDTH)).view(count, WIDTH).to(torch.uint8)


def _packed(rank: int, count: int) -> Tensor:
    ids = torch.tensor([[0, -1], [1, 0], [-1, 1]], dtype=torch.int32).repeat(3, 1)[:count]
    weights = rank + torch.arange(count * SLOTS, dtype=torch.float32).view(count, SLOTS)
    return torch.cat([ids.view(torch.uint8), weights.view(torch.uint8)], dim=1)


def check(wrong: str, device: str) -> None:
    """Rows that were sent, and others that choose no expert; nothing if anything is wrong."""
    found = read(wrong, device)
    sent = sum(COUNTS) if wrong == "nothing" else 0
    many = 10 if wrong == "rows" else 13
    assert found.rows.shape == (many, WIDTH)
    assert found.ends.tolist() == ([4, 4, 11] if sent else [0, 0, 0])
    right = torch.cat([_rows(rank, count) for rank, count in enumerate(COUNTS)])
    assert torch.equal(found.rows[:sent].cpu(), right[:sent])
    ids = [[0, 2], [1, 0], [2, 1], [0, 2], [0, 2], [1, 0], [2, 1], [0, 2], [1, 0], [2, 1], [0, 2]]
    assert found.keys.tolist() == ids[:sent] + [[2, 2]] * (many - sent)
    weights = [*range(8), *range(2, 16)][: 2 * sent] + [0] * 2 * (many - sent)
    assert found.weights.flatten().tolist() == weights
