"""Rows pushed into other ranks' memory, and the flags by which ranks say so.

*Memory* is a list of R tensors (B,) of bytes, one per rank of a group, all mapped into this
process: those of other GPUs of this host, or on the CPU memory that processes share. The CUDA
kernels (csrc/exchange) and their twins follow one protocol:

- a sender alone decides where its rows go, by its own running counts;
- it sets a flag once they have been written; who has seen the flag may read them;
- a flag is the number of an exchange, which only grows, above a tag that says which exchange it is.
  Nobody resets one.

R ranks, N rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fastmoe.ops.native import native

MAX_RANKS = 32
"""Most ranks of a group that the kernels support."""

FLAG_BYTES = 128
"""Bytes of a flag: a cache line of its own."""

TAG_BITS = 16
"""Lower bits of a flag that hold its tag."""

GIVEN_UP_AT = 0
"""Memory with flags begins with those of ranks that have given up: nobody waits for them."""

ALIGNMENT = 16
"""What the byte at which rows or flags begin must be a multiple of."""

_FENCE = threading.Lock()


def push_rows(
    rows: Tensor,
    order: Tensor | None,
    ends: Tensor,
    divisor: int,
    memory: Sequence[Tensor],
    rank: int,
    at: int,
    most: int,
    bulk_blocks: int = 0,
) -> None:
    """Writes rows into the memory of the ranks that they are for.

    Args:
        rows: (n, w), contiguous.
        order: (N,) int64; rows ``order[i] // divisor`` are sent, by rank. None sends ``rows``
            themselves. Entries from ``ends[-1]`` on are not sent.
        ends: (R,) int32, where the rows of each rank end.
        divisor: see ``order``.
        memory: of each rank.
        rank: this one.
        at: the byte of each rank's memory that the first row for it goes to; the others follow.
        most: the number of rows that there is room for.
        bulk_blocks: on Hopper GPUs, the thread blocks that move rows by bulk copies; 0 for loads
            and stores by all of the device. Layers don't use bulk copies: they have run between
            "ranks" on one GPU only (benchmarks/exchange.py would measure them between several).
    """
    if (library := native(rows, ends)) is not None:
        library.exchange_push(rows, order, ends, divisor, memory, rank, at, most, bulk_blocks)
        return
    begin = 0
    for there, end in zip(memory, ends.tolist(), strict=True):
        assert end - begin <= most, (begin, end, most)
        if order is None:
            sent = rows[begin:end]
        else:
            sent = rows[torch.div(order[begin:end], divisor, rounding_mode="floor")]
        flat = sent.reshape(-1).view(torch.uint8)
        there[at : at + flat.numel()].copy_(flat)
        begin = end


def send_rows(
    parts: Sequence[Tensor],
    order: Tensor | None,
    divisors: Sequence[int],
    ends: Tensor,
    memory: Sequence[Tensor],
    rank: int,
    at: Sequence[int],
    most: int,
    flags: Sequence[Tensor],
    flags_at: int,
    value: int,
) -> None:
    """:func:`push_rows` for each part of rows that go to the same ranks, then :func:`set_flags`.

    Args:
        parts: each (n, w), contiguous.
        order: as in :func:`push_rows`, for all parts.
        divisors: of each part.
        ends: (R,) int32, where the rows of each rank end.
        memory: of each rank.
        rank: this one.
        at: of each part.
        most: the number of rows that there is room for.
        flags: memory of each rank that has the flags.
        flags_at: the byte at which they begin.
        value: the flag's new value.
    """
    if (library := native(*parts, ends)) is not None:
        library.exchange_send(
            parts, order, ends, divisors, memory, rank, at, most, flags, flags_at, value
        )
        return
    for rows, divisor, begin in zip(parts, divisors, at, strict=True):
        push_rows(rows, order, ends, divisor, memory, rank, begin, most)
    set_flags(flags, rank, flags_at, value)


def flags_of(memory: Tensor, at: int, ranks: int) -> Tensor:
    """(R,) int64: the flags at byte ``at`` of one rank's memory, a view."""
    lines = memory[at : at + ranks * FLAG_BYTES].view(torch.int64)
    return lines.view(ranks, FLAG_BYTES // 8)[:, 0]


def set_flags(memory: Sequence[Tensor], rank: int, at: int, value: int) -> None:
    """Sets this rank's flag of all ranks, once all that was pushed before has been written.

    Not if this rank has given up, as a wait on a GPU does without ending the stream's work: others
    would read what has not been pushed.

    Args:
        memory: of each rank.
        rank: this one.
        at: the byte at which the flags begin, R of them.
        value: the new value.
    """
    if (library := native(memory[0])) is not None:
        library.exchange_set_flags(memory, rank, at, value)
        return
    if at != GIVEN_UP_AT and flags_of(memory[rank], GIVEN_UP_AT, len(memory))[rank] != 0:
        return
    fence()
    for there in memory:
        flags_of(there, at, len(memory))[rank] = value


def wait_for_flags(
    memory: Sequence[Tensor],
    rank: int,
    at: int,
    value: int,
    report: Tensor,
    seconds: float,
    fatal: bool,
) -> None:
    """Makes the current stream wait until all ranks have set their flags here; CUDA only.

    Its twin, for the CPU, is a host that looks at :func:`flags_of` until :func:`compare_flags`
    finds nothing missing.

    Args:
        memory: of each rank.
        rank: this one.
        at: the byte at which the flags begin.
        value: what to wait for.
        report: (4,) int64, pinned. If the wait fails: a bit for each rank whose flag is missing,
            one for each whose flag is of another exchange, one for each that had given up, and
            ``value``. This rank then gives up too, and tells the others.
        seconds: the deadline; 0 for none.
        fatal: whether a failure ends the process's use of the device, so that nothing computes with
            what never came.
    """
    library = native(memory[0])
    assert library is not None
    library.exchange_wait(memory, rank, at, value, report, seconds, fatal)


def compare_flags(flags: Tensor, value: int) -> tuple[int, int]:
    """(bits of ranks whose flag isn't there, bits of those whose flag is of another exchange)."""
    missing = different = 0
    for rank, flag in enumerate(flags.tolist()):
        if flag != value:
            missing |= 1 << rank
            if flag >> TAG_BITS >= value >> TAG_BITS:
                different |= 1 << rank
    return missing, different


def fence() -> None:
    """Keeps the interpreter from reordering this thread's accesses to shared memory.

    The processor must not reorder them either: x86 keeps stores, and loads, in order.
    """
    with _FENCE:
        pass


__all__ = [
    "ALIGNMENT",
    "FLAG_BYTES",
    "GIVEN_UP_AT",
    "MAX_RANKS",
    "TAG_BITS",
    "compare_flags",
    "fence",
    "flags_of",
    "push_rows",
    "send_rows",
    "set_flags",
    "wait_for_flags",
]
