"""Token counts of all ranks, in tables that each rank has in its own memory.

A rank's vector is a header (magic number, layer, sequence number, row width, sum and checksum) and
the counts, padded. The kernels of csrc/exchange/counts.cu and their twins make the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fastmoe.ops import exchange
from lightning_fastmoe.ops.native import native

MAGIC = 0x4D6F45  # "MoE"
HEADER = 6  # magic, layer, sequence number, row width, total, checksum
_FACTOR, _MODULUS = 2654435761, 2147483647


def pack(counts: Tensor, slots: int, header: Sequence[int]) -> Tensor:
    """The vector that a rank sends, int64.

    Args:
        counts: (n,) int64.
        slots: how many there are with padding.
        header: magic number, layer, sequence number and row width.
    """
    body = torch.nn.functional.pad(counts, (0, slots - counts.numel()))
    head = torch.tensor(list(header), dtype=torch.int64).to(counts.device, non_blocking=True)
    return torch.cat([head, body.sum().reshape(1), checksums(body).reshape(1), body])


def checksums(bodies: Tensor) -> Tensor:
    """Sums over the last dimension with pseudo-random weights, to detect moved counts."""
    return (bodies * factors(bodies.shape[-1], bodies.device)).sum(-1)


def factors(slots: int, device: torch.device) -> Tensor:
    """(slots,) int64: the weights of :func:`checksums`."""
    position = torch.arange(1, slots + 1, device=device, dtype=torch.int64)
    return position * _FACTOR % _MODULUS


def announce(
    of_experts: Tensor,
    of_ranks: Tensor,
    needed: int | None,
    header: Sequence[int],
    slots: int,
    memory: Sequence[Tensor],
    rank: int,
    at: int,
    flags_at: int,
    value: int,
    stream: int,
) -> None:
    """Writes this rank's vector into all ranks' memory, then sets its flags.

    Args:
        of_experts: (n,) int64, the first counts.
        of_ranks: (m,) int64, the next ones.
        needed: one more, or None.
        header: see :func:`pack`.
        slots: as in :func:`pack`.
        memory: of each rank.
        rank: this one.
        at: the byte that the vector goes to.
        flags_at: the byte at which the flags begin.
        value: of the flag.
        stream: on a GPU, the stream that does it, after all that the current one does so far.
    """
    last = -1 if needed is None else needed
    if (library := native(of_experts, of_ranks)) is not None:
        library.exchange_announce(
            *(of_experts, of_ranks, last, list(header), slots),
            *(memory, rank, at, flags_at, value, stream),
        )
        return
    more = [] if needed is None else [of_experts.new_tensor([needed])]
    sent = pack(torch.cat([of_experts, of_ranks, *more]), slots, header).view(torch.uint8)
    for there in memory:
        there[at : at + sent.numel()].copy_(sent)
    exchange.set_flags(memory, rank, flags_at, value)


def await_table(
    memory: Sequence[Tensor],
    rank: int,
    flags_at: int,
    value: int,
    at: int,
    block_bytes: int,
    found: Tensor,
    report: Tensor,
    seconds: float,
    stream: int,
) -> None:
    """Copies all ranks' vectors to the host, once their flags are here; CUDA only.

    Its twin, for the CPU, is a host that waits for flags and reads :func:`table`.

    Args:
        memory: of each rank.
        rank: this one.
        flags_at: the byte at which the flags begin.
        value: what to wait for.
        at: the byte at which the first rank's vector begins.
        block_bytes: from one vector to the next.
        found: (R, n) int64, pinned: the result, unless the wait fails.
        report: see :func:`~lightning_fastmoe.ops.exchange.wait_for_flags`.
        seconds: the deadline; 0 for none.
        stream: does it.
    """
    library = native(memory[0])
    assert library is not None
    library.exchange_await(
        memory, rank, flags_at, value, at, block_bytes, found, report, seconds, stream
    )


def table(memory: Tensor, at: int, block_bytes: int, ranks: int, columns: int) -> Tensor:
    """(R, columns) int64: all ranks' vectors in a rank's memory, a view."""
    blocks = memory[at : at + ranks * block_bytes].view(torch.int64)
    return blocks.view(ranks, -1)[:, :columns]
