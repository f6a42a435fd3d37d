"""Choices of tokens on several ranks, and in plain loops what is sent where: twins and kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.distributed.schedule.dedup import owners
from lightning_fastmoe.ops.exchange_arrival import Blocks, of_slots, receive, sum_of_ranks
from lightning_fastmoe.ops.exchange_plan import PairPlan, plan_pairs


@dataclass(frozen=True)
class Case:
    """What tokens chose.

    Attributes:
        tokens: T.
        slots: K.
        placement: global ids of the experts of each rank.
        dropped: every how many-th slot is dropped; 0 for none.
        only: the experts that are chosen; None for all.
    """

    tokens: int
    slots: int
    placement: tuple[tuple[int, ...], ...]
    dropped: int = 0
    only: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        return len(self.placement)

    @property
    def num_experts(self) -> int:
        return sum(map(len, self.placement))


CASES = [
    Case(7, 2, ((0, 1), (2, 3))),
    Case(300, 3, ((5, 0, 2), (1, 3), (4, 6, 7)), dropped=3),
    Case(1000, 8, tuple(tuple(range(r * 16, r * 16 + 16)) for r in range(4))),
    Case(513, 2, ((0, 1), (2, 3), (4, 5)), only=(2, 3)),  # two ranks get nothing
    Case(40, 2, ((0, 1), (2, 3)), dropped=1),  # nothing is sent
    Case(0, 2, ((0, 1), (2, 3))),
    Case(5, 1, ((0, 1, 2),)),
]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """``chosen``, ``where`` and ``weights``."""
    generator = torch.Generator().manual_seed(case.tokens)
    among = torch.tensor(case.only or range(case.num_experts))
    rows = [among[torch.randperm(len(among), generator=generator)] for _ in range(case.tokens)]
    chosen = (
        torch.stack(rows)[:, : case.slots].contiguous()
        if rows
        else torch.empty(0, case.slots).long()
    )
    if case.dropped:
        chosen.view(-1)[:: case.dropped] = case.num_experts
    weights = torch.rand(case.tokens, case.slots, generator=generator)
    return chosen, owners(case.placement, case.num_experts), weights


Sent = list[list[tuple[int, list[int], list[float]]]]


def sent(case: Case) -> Sent:
    """For each rank what it gets: token, local experts (-1 for others') and weights."""
    chosen, _, weights = inputs(case)
    found: Sent = []
    for held in case.placement:
        rows = []
        for t, (experts, own) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
            ids = [held.index(e) if e in held else -1 for e in experts]
            if any(i >= 0 for i in ids):
                rows.append((t, ids, own))
        found.append(rows)
    return found


def check(case: Case, device: str, dtype: torch.dtype) -> None:
    """The plan, and what each rank would unpack, if rows lay among bytes of nobody."""
    chosen, where, weights = (t.to(device) for t in inputs(case))
    weights = weights.to(dtype)
    plan, packed = plan_pairs(chosen, where, weights, case.ranks)
    expected = sent(case)
    of_experts = torch.bincount(inputs(case)[0].flatten(), minlength=case.num_experts + 1)
    rows = [len(one) for one in expected]
    assert plan.of_experts.tolist() == of_experts[: case.num_experts].tolist()
    assert plan.of_ranks.tolist() == rows
    assert plan.ends.tolist() == torch.tensor(rows).cumsum(0).tolist()
    assert plan.ends.dtype == torch.int32
    order = plan.order[: sum(rows)].tolist()
    pairs = [(t, r) for r, one in enumerate(expected) for t, _, _ in one]
    assert [divmod(pair, case.ranks) for pair in order] == pairs
    check_receiving(case, plan, packed, dtype)
    check_what_comes_back(case, plan, dtype)


WIDTH = 24
"""Bytes of the rows that travel with packed ones."""


def check_receiving(case: Case, plan: PairPlan, packed: Tensor, dtype: torch.dtype) -> None:
    """Reads rows among bytes of nobody, as if two ranks had sent the same."""
    most, at = 2 + case.tokens, 16
    begin = 0
    for expected, held in zip(sent(case), case.placement, strict=True):
        own = packed[plan.order[begin : begin + len(expected)]]
        begin += len(expected)
        sizes = [-(-most * width // 16) * 16 for width in (WIDTH, packed.shape[1])]
        memory = torch.full((at + 2 * sum(sizes),), 0x7F, dtype=torch.uint8, device=own.device)
        places = Blocks(memory, at, sizes[0], WIDTH)
        numbers = Blocks(memory, at + 2 * sizes[0], sizes[1], packed.shape[1])
        counts = [len(expected), max(0, len(expected) - 1)]
        rows = torch.arange(sum(counts) * WIDTH, device=own.device).view(-1, WIDTH).byte()
        for rank, some in enumerate(rows.split(counts)):
            places.of(rank, counts[rank]).copy_(some)
            numbers.of(rank, counts[rank]).copy_(own[: counts[rank]])
        found = receive(places, counts, numbers, len(held), dtype)
        assert torch.equal(found.rows, rows)
        assert torch.equal(receive(places, counts).rows, rows)
        assert found.ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
        assert found.ends.dtype == torch.int32
        both = [*expected, *expected[: counts[1]]]
        ids = [[len(held) if i < 0 else i for i in row] for _, row, _ in both]
        assert found.keys.tolist() == ids
        assert found.keys.dtype == torch.int64
        assert found.weights.dtype == dtype
        right = torch.tensor([row for _, _, row in both]).view(-1, case.slots)
        assert torch.equal(found.weights.float().cpu(), right)


def check_what_comes_back(case: Case, plan: PairPlan, dtype: torch.dtype) -> None:
    """Each rank returns a row that tells its number and the token, and K numbers of slots."""
    expected, most, width = sent(case), case.tokens + 3, 8
    device = plan.inverse.device
    rows = torch.full((case.ranks * most, width), torch.nan, dtype=dtype, device=device)
    block = -(-most * case.slots * dtype.itemsize // 16) * 16
    memory = torch.full((32 + case.ranks * block,), 0x7F, dtype=torch.uint8, device=device)
    slots = Blocks(memory, 32, block, case.slots * dtype.itemsize)
    sums = torch.zeros(case.tokens, width, dtype=torch.float64)
    of_slot = torch.zeros(case.tokens, case.slots, dtype=torch.float64)
    for rank, one in enumerate(expected):
        for n, (t, ids, _) in enumerate(one):
            rows[rank * most + n] = 1000 * rank + t
            sums[t] += 1000 * rank + t
            numbers = 10 * t + 10000 * rank + torch.arange(case.slots, dtype=torch.float64)
            slots.of(rank, n + 1)[n] = numbers.to(dtype).view(torch.uint8).to(device)
            for k, i in enumerate(ids):
                if i >= 0:
                    of_slot[t, k] = numbers[k]
    assert torch.equal(sum_of_ranks(rows, plan, most).double().cpu(), sums)
    got = of_slots(slots, plan, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.double().cpu(), of_slot)
