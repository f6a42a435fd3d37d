"""The kernels of csrc/exchange: "ranks" whose memory is on one GPU, in one process."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from ops import ahead_cases, plan_cases
from ops import exchange_cases as cases

from lightning_fastmoe.ops import exchange, exchange_counts, kernels
from lightning_fastmoe.ops.native import load

VALUE = 3 << exchange.TAG_BITS | 9


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_rows_go_where_the_senders_counts_say(case: cases.Case) -> None:
    rows, order, ends = (t if t is None else t.cuda() for t in cases.inputs(case))
    memory = [own.cuda() for own in cases.memory(case)]
    flat = rows.view(torch.uint8)
    most, divisor = max(case.counts), case.divisor or 1
    exchange.push_rows(flat, order, ends, divisor, memory, case.rank, cases.AT, most)
    for found, right in zip(memory, cases.expected(case), strict=True):
        assert torch.equal(found.cpu(), right)


@pytest.mark.parametrize("blocks", [1, 3, 132])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_bulk_copies(case: cases.Case, blocks: int) -> None:
    """Rows of whole 16 bytes, some of them longer than a chunk."""
    wide = dataclasses.replace(case, width=case.width * 16 if case.width < 1024 else 4 * case.width)
    rows, order, ends = (t if t is None else t.cuda() for t in cases.inputs(wide))
    memory = [own.cuda() for own in cases.memory(wide)]
    flat = rows.view(torch.uint8)
    most, divisor = max(wide.counts), wide.divisor or 1
    arguments = (order, ends, divisor, memory, wide.rank, cases.AT, most, blocks)
    exchange.push_rows(flat, *arguments)
    for found, right in zip(memory, cases.expected(wide), strict=True):
        assert torch.equal(found.cpu(), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", plan_cases.CASES, ids=str)
def test_plans(case: plan_cases.Case, dtype: torch.dtype) -> None:
    plan_cases.check(case, "cuda", dtype)


@pytest.mark.parametrize("wrong", ahead_cases.WRONG)
def test_rows_read_before_the_host_knows_their_counts(wrong: str) -> None:
    ahead_cases.check(wrong, "cuda")


def test_rows_that_start_at_an_odd_byte() -> None:
    raw = torch.arange(1 + 6 * 16, dtype=torch.uint8, device="cuda")
    rows = raw[1:].view(6, 16)
    memory = [torch.zeros(64, dtype=torch.uint8, device="cuda") for _ in range(2)]
    ends = torch.tensor([2, 6], dtype=torch.int32, device="cuda")
    exchange.push_rows(rows, None, ends, 1, memory, 0, 0, 4)
    assert memory[0].tolist() == [*range(1, 33), *[0] * 32]
    assert memory[1].tolist() == list(range(33, 97))


@pytest.mark.parametrize("needed", [None, 0, 12345])
@pytest.mark.parametrize("sizes", [(0, 0), (5, 2), (600, 3)], ids=str)
def test_announced_counts(sizes: tuple[int, int], needed: int | None) -> None:
    """The bytes of the twin, on another stream, after what the current one does."""
    generator = torch.Generator().manual_seed(sum(sizes))
    of_experts, of_ranks = (torch.randint(1 << 40, (n,), generator=generator) for n in sizes)
    slots, ranks, at = sum(sizes) + 4, 3, 3 * 3 * exchange.FLAG_BYTES
    block = 8 * (exchange_counts.HEADER + slots + 1) // 16 * 16
    header = (exchange_counts.MAGIC, 77, 1 << 40, 5)
    right = [torch.full((at + ranks * block,), 3, dtype=torch.uint8) for _ in range(ranks)]
    for own in right:
        exchange.flags_of(own, exchange.GIVEN_UP_AT, ranks).zero_()
    memory = [own.cuda() for own in right]
    aside = torch.cuda.Stream()
    given = of_experts.cuda(), of_ranks.cuda()
    late = [torch.zeros_like(one) for one in given]
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)
    for to, one in zip(late, given, strict=True):
        to.copy_(one)
    for on_gpu, (counts, to) in enumerate((((of_experts, of_ranks), right), (late, memory))):
        for rank in range(ranks):
            where = (rank, at + rank * block, ranks * exchange.FLAG_BYTES, VALUE)
            stream = aside.cuda_stream if on_gpu else 0
            exchange_counts.announce(*counts, needed, header, slots, to, *where, stream)
    report = torch.zeros(4, dtype=torch.int64, pin_memory=True)
    columns = exchange_counts.HEADER + slots
    found = torch.zeros(ranks, columns, dtype=torch.int64, pin_memory=True)
    where = (1, ranks * exchange.FLAG_BYTES, VALUE, at, block)
    stream = aside.cuda_stream
    exchange_counts.await_table(memory, *where, found, report, 20.0, stream)
    aside.synchronize()
    assert report.tolist() == [0, 0, 0, 0]
    for a, b in zip(memory, right, strict=True):
        assert torch.equal(a.cpu(), b)
    assert torch.equal(found, exchange_counts.table(right[1], at, block, ranks, columns))
    assert found[0, 2].item() == 1 << 40


def test_a_table_of_which_a_part_never_comes() -> None:
    group = Group()
    group.set(1)
    found = torch.full((3, 4), 7, dtype=torch.int64, pin_memory=True)
    memory = [torch.cat([own, torch.zeros(3 * 32, device="cuda").byte()]) for own in group.memory]
    where = (2, group.at, VALUE, 2 * group.at, 32)
    stream = torch.cuda.current_stream().cuda_stream
    exchange_counts.await_table(memory, *where, found, group.report, 0.3, stream)
    torch.cuda.synchronize()
    assert group.report.tolist() == [0b101, 0, 0, VALUE]
    assert (found == 7).all()


def test_parts_of_rows_and_a_flag() -> None:
    """The bytes of the twin."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(256, (6, w), generator=generator).byte() for w in (48, 24, 7)]
    order = torch.tensor([3, 11, 0, 9, 4, 1, 2])
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    at, flags_at = [384, 384 + 4 * 48, 384 + 4 * 80], 3 * exchange.FLAG_BYTES
    results = []
    for device in ("cpu", "cuda"):
        memory = [torch.zeros(1024, dtype=torch.uint8, device=device) for _ in range(3)]
        flags = [torch.zeros(1024, dtype=torch.uint8, device=device) for _ in range(3)]
        given = [part.to(device) for part in parts], order.to(device), [2, 2, 2], ends.to(device)
        exchange.send_rows(*given, memory, 1, at, 4, flags, flags_at, VALUE)
        exchange.send_rows(
            *([given[0][0]], None, [1], ends.to(device), memory, 0, [16], 4, flags, 0, 5)
        )
        results.append([t.cpu() for t in (*memory, *flags)])
    for found, right in zip(*results, strict=True):
        assert torch.equal(found, right)
    assert exchange.flags_of(results[1][5], flags_at, 3).tolist() == [0, VALUE, 0]


class Group:
    """Flags of three ranks."""

    def __init__(self) -> None:
        size = 2 * 3 * exchange.FLAG_BYTES
        self.memory = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(3)]
        self.at = 3 * exchange.FLAG_BYTES
        self.report = torch.zeros(4, dtype=torch.int64, pin_memory=True)

    def set(self, rank: int, value: int = VALUE, at: int | None = None) -> None:
        exchange.set_flags(self.memory, rank, self.at if at is None else at, value)

    def wait(self, rank: int, seconds: float = 20.0) -> None:
        exchange.wait_for_flags(self.memory, rank, self.at, VALUE, self.report, seconds, False)

    def given_up(self) -> list[list[int]]:
        torch.cuda.synchronize()
        flags = [exchange.flags_of(own, exchange.GIVEN_UP_AT, 3) for own in self.memory]
        return [each.tolist() for each in flags]


def test_each_rank_has_a_flag_of_its_own_in_every_rank() -> None:
    group = Group()
    group.set(1)
    for own in group.memory:
        assert exchange.flags_of(own, 0, 3).tolist() == [0, 0, 0]
        assert exchange.flags_of(own, group.at, 3).tolist() == [0, VALUE, 0]


def test_a_wait_ends_when_the_last_flag_is_set() -> None:
    group, aside = Group(), torch.cuda.Stream()
    seen = torch.zeros(1, device="cuda")
    other = torch.zeros(1, device="cuda")
    # CUDA loads a kernel when it is first launched, and may wait for all others to end for that.
    torch.cuda._sleep(1)
    other.fill_(1.0)
    seen.copy_(torch.zeros_like(other))
    Group().set(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(aside):
        group.wait(0)
        seen.copy_(other)
    group.set(0)
    group.set(2)
    torch.cuda._sleep(20_000_000)
    other.fill_(5.0)
    group.set(1)
    torch.cuda.synchronize()
    assert float(seen) == 5.0
    assert group.report.tolist() == [0, 0, 0, 0]
    assert group.given_up() == [[0, 0, 0]] * 3


def test_the_deadline_names_who_is_missing_and_tells_all() -> None:
    group = Group()
    group.set(1)
    begin = time.monotonic()
    group.wait(2, seconds=0.5)
    torch.cuda.synchronize()
    assert 0.4 < time.monotonic() - begin < 5
    assert group.report.tolist() == [0b101, 0, 0, VALUE]
    assert group.given_up() == [[0, 0, 1]] * 3


@pytest.mark.parametrize("flag", [3 << exchange.TAG_BITS | 8, 4 << exchange.TAG_BITS | 9])
def test_another_exchange_is_reported_at_once(flag: int) -> None:
    group = Group()
    group.set(0)
    group.set(1, flag)
    begin = time.monotonic()
    group.wait(0)
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 5
    assert group.report.tolist() == [0b110, 0b010, 0, VALUE]


def test_an_earlier_exchange_is_waited_for() -> None:
    group = Group()
    for rank in range(3):
        group.set(rank, 2 << exchange.TAG_BITS | 1000)
    group.wait(0, seconds=0.3)
    torch.cuda.synchronize()
    assert group.report.tolist() == [0b111, 0, 0, VALUE]


def test_nobody_waits_once_a_rank_has_given_up() -> None:
    group = Group()
    group.set(2, 1, exchange.GIVEN_UP_AT)
    begin = time.monotonic()
    group.wait(0)
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 5
    assert group.report.tolist() == [0b111, 0, 0b100, VALUE]
    assert group.given_up() == [[1, 0, 1]] * 3


def test_a_rank_that_has_given_up_sets_no_other_flag() -> None:
    """What it pushes after a wait that has failed is not what others wait for."""
    group = Group()
    group.wait(2, seconds=0.1)
    for rank in (0, 2):
        group.set(rank)
    assert group.given_up() == [[0, 0, 1]] * 3
    for own in group.memory:
        assert exchange.flags_of(own, group.at, 3).tolist() == [VALUE, 0, 0]


def test_errors() -> None:
    memory = [torch.zeros(256, dtype=torch.uint8, device="cuda") for _ in range(2)]
    rows = torch.zeros(2, 16, dtype=torch.uint8, device="cuda")
    ends = torch.tensor([1, 2], dtype=torch.int32, device="cuda")
    library = load()
    assert library is not None
    push, wait = library.exchange_push, library.exchange_wait
    with pytest.raises(RuntimeError, match="are not in a rank's memory"):
        push(rows, None, ends, 1, memory, 0, 0, 17, 0)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        push(rows, None, ends, 1, memory, 0, 8, 1, 0)
    with pytest.raises(RuntimeError, match="no rank 2"):
        push(rows, None, ends, 1, memory, 2, 0, 1, 0)
    with pytest.raises(RuntimeError, match="ends must have size 2"):
        push(rows, None, ends[:1], 1, memory, 0, 0, 1, 0)
    with pytest.raises(RuntimeError, match="between 1 and 32 ranks"):
        push(rows, None, ends, 1, memory * 20, 0, 0, 1, 0)
    with pytest.raises(RuntimeError, match="bulk copies need"):
        push(rows[:, :8].contiguous(), None, ends, 1, memory, 0, 0, 1, 2)
    with pytest.raises(RuntimeError, match="are not in a rank's memory"):
        library.exchange_set_flags(memory, 0, 128, 1)
    report = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="report"):
        wait(memory, 0, 0, 1, report.int(), 1.0, False)
    counts, stream = torch.zeros(3, dtype=torch.int64, device="cuda"), 0
    with pytest.raises(RuntimeError, match="7 numbers don't fit into 6"):
        library.exchange_announce(counts, counts, 1, [1] * 4, 6, memory, 0, 0, 0, 1, stream)
    with pytest.raises(RuntimeError, match="are more than a rank sends"):
        library.exchange_receive(memory[0], 0, 32, 16, [3, 1], 0, 32, 0, 1)
    with pytest.raises(RuntimeError, match="are not in a rank's memory"):
        library.exchange_receive(memory[0], 0, 256, 16, [3, 1], 0, 32, 0, 1)
    with pytest.raises(RuntimeError, match="as many divisors"):
        library.exchange_send([rows], None, ends, [], memory, 0, [0], 1, memory, 0, 1)


def test_opcheck() -> None:
    library = load()
    assert library is not None
    chosen = torch.tensor([[0, 3], [2, 1]], device="cuda")
    where = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 0, 1, -1]], device="cuda")
    weights = torch.rand(2, 2, device="cuda")
    order, inverse, offsets, owner, *_ = library.exchange_plan(chosen, where, weights, 2)
    memory = torch.zeros(2048, dtype=torch.uint8, device="cuda")
    calls = {
        library.exchange_plan: (chosen, where, weights, 2),
        library.exchange_receive: (memory, 0, 64, 16, [2, 1], 512, 64, 2, 2),
        library.exchange_sums: (torch.rand(8, 16, device="cuda"), inverse, offsets, 4),
        library.exchange_slots: (memory, 0, 64, inverse, offsets, owner),
    }
    for op, args in calls.items():
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_of_rows_among_rows_of_nobody(dtype: torch.dtype) -> None:
    ranks, tokens, most = 3, 4, 9
    rows = torch.full((ranks * most, 40), torch.nan, dtype=dtype)
    places = torch.full((tokens, ranks), -1)
    right = torch.zeros(tokens, 40, dtype=torch.float64)
    for token, rank, slot in ((0, 0, 0), (0, 2, 1), (1, 1, 5), (3, 0, 1), (3, 1, 8), (3, 2, 0)):
        rows[rank * most + slot] = torch.randn(40)
        places[token, rank] = rank * most + slot
        right[token] += rows[rank * most + slot].double()
    found = kernels.sum_placed_rows(rows.cuda(), places.view(-1).cuda(), ranks).cpu()
    assert found.dtype == dtype
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), right, rtol=bound, atol=bound)
