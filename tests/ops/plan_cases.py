"""Choices of tokens on several ranks, and in plain loops what is sent where: twins and kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.distributed.schedule.dedup import owners
from lightning_fastmoe.ops.exchange_plan import PairPlan, plan_pairs, unpack_pairs


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
    assert plan.counts.tolist() == [*of_experts[: case.num_experts].tolist(), *rows]
    assert plan.ends.tolist() == torch.tensor(rows).cumsum(0).tolist()
    assert plan.ends.dtype == torch.int32
    order = plan.order[: sum(rows)].tolist()
    pairs = [(t, r) for r, one in enumerate(expected) for t, _, _ in one]
    assert [divmod(pair, case.ranks) for pair in order] == pairs
    check_unpacking(case, plan, packed, dtype)
    check_places(case, plan)


def check_unpacking(case: Case, plan: PairPlan, packed: Tensor, dtype: torch.dtype) -> None:
    most, at = 2 + case.tokens, 16
    begin = 0
    for expected, held in zip(sent(case), case.placement, strict=True):
        own = packed[plan.order[begin : begin + len(expected)]]
        begin += len(expected)
        # As if two ranks had sent the same, with room for more.
        block = -(-most * packed.shape[1] // 16) * 16
        memory = torch.full((at + 2 * block,), 0x7F, dtype=torch.uint8, device=own.device)
        for rank in range(2):
            memory[at + rank * block :][: own.numel()] = own.flatten()
        counts = [len(expected)] * 2
        ends = torch.tensor(counts).cumsum(0).to(own.device, torch.int32)
        weights, keys = unpack_pairs(memory, at, block, ends, counts, case.slots, len(held), dtype)
        ids = [[len(held) if i < 0 else i for i in row] for _, row, _ in expected] * 2
        assert keys.tolist() == ids
        assert keys.dtype == torch.int64
        assert weights.dtype == dtype
        right = torch.tensor([row for _, _, row in expected] * 2).view(-1, case.slots)
        assert torch.equal(weights.float().cpu(), right)


def check_places(case: Case, plan: PairPlan) -> None:
    expected, most = sent(case), case.tokens + 3
    places, slots = plan.places(most)
    right = torch.full((case.tokens, case.ranks), -1)
    of_slots = torch.full((case.tokens, case.slots), -1)
    row = 0
    for rank, one in enumerate(expected):
        for n, (t, ids, _) in enumerate(one):
            right[t, rank] = rank * most + n
            for k, i in enumerate(ids):
                if i >= 0:
                    of_slots[t, k] = row * case.slots + k
            row += 1
    assert places.tolist() == right.flatten().tolist()
    assert slots.tolist() == of_slots.flatten().tolist()
