"""Reading what other ranks have written into this rank's memory.

Each rank's rows are in a block of its own, one behind the other. The functions are the kernels of
csrc/exchange/arrival.cu and their twins. R ranks; :mod:`~lightning_fastmoe.ops.exchange_plan` says
what a pair is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.exchange import flags_of
from lightning_fastmoe.ops.exchange_plan import ID_BYTES, PairPlan
from lightning_fastmoe.ops.native import native


@dataclass(frozen=True)
class Blocks:
    """Rows of all ranks in this rank's memory.

    Attributes:
        memory: (B,) uint8.
        at: the byte at which the first rank's begin, a multiple of 16.
        block_bytes: bytes from one rank's to the next one's, a multiple of 16.
        row_bytes: bytes of a row.
    """

    memory: Tensor
    at: int
    block_bytes: int
    row_bytes: int

    def of(self, rank: int, count: int) -> Tensor:
        """(count, row_bytes) uint8: the first rows of a rank, a view."""
        begin = self.at + rank * self.block_bytes
        return self.memory[begin : begin + count * self.row_bytes].view(count, self.row_bytes)

    def together(self, counts: Sequence[int]) -> Tensor:
        """(sum(counts), row_bytes) uint8: the ranks' rows, one rank's behind the other's."""
        return torch.cat([self.of(rank, count) for rank, count in enumerate(counts)])


class Received(NamedTuple):
    """Tokens that came here.

    Attributes:
        rows: (S', row_bytes) uint8, by rank.
        weights: (S', K).
        keys: (S', K) int64, the local expert of each slot, e for those of other ranks.
        ends: (R,) int32, where each rank's rows end.
    """

    rows: Tensor
    weights: Tensor
    keys: Tensor
    ends: Tensor


def receive(
    rows: Blocks,
    counts: Sequence[int],
    packed: Blocks | None = None,
    num_local: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Received:
    """Reads tokens and what came with them, as :func:`plan_pairs` packed it.

    Args:
        rows: of tokens.
        counts: the rows of each rank.
        packed: expert numbers and weights of K slots for each of them; None for K = 0.
        num_local: e.
        dtype: of the weights.
    """
    if packed is None:
        packed = replace(rows, row_bytes=0)
    slots = packed.row_bytes // (ID_BYTES + dtype.itemsize)
    library = native(rows.memory)
    if library is not None and dtype == torch.float32:
        return Received(
            *library.exchange_receive(
                *(rows.memory, rows.at, rows.block_bytes, rows.row_bytes, list(counts)),
                *(packed.at, packed.block_bytes, slots, num_local),
            )
        )
    ends = torch.tensor(counts).cumsum(0).to(rows.memory.device, torch.int32)
    bytes_of = packed.together(counts).tensor_split([slots * ID_BYTES], dim=1)
    ids, weights = (part.reshape(-1).clone() for part in bytes_of)
    keys = ids.view(torch.int32).long().view(-1, slots) if slots else ids.view(sum(counts), 0)
    return Received(
        rows.together(counts),
        weights.view(dtype).view(keys.shape),
        torch.where(keys < 0, num_local, keys).long(),
        ends,
    )


@dataclass(frozen=True)
class Expected:
    """What must be so for rows to be read before the host has seen the counts.

    Attributes:
        control: (B,) uint8, this rank's flags and its table of counts.
        flags: the place and value of all ranks' flags for the counts, and for the rows.
        table: the place of the table, the bytes of a rank's block and of its header, after which
            come int64: the tokens of E experts, the rows for R ranks, the bytes that a rank needs.
        where: (2, E + 1) int64, each expert's rank.
        rank: this one.
        ranks: R.
        capacity: the bytes that a rank has room for.
        most: the rows that a rank has room for.
        rows: how many come at most, of all ranks.
        pairs: how many (row, slot) pairs choose an expert of this rank at most.
    """

    control: Tensor
    flags: Sequence[tuple[int, int]]
    table: tuple[int, int, int]
    where: Tensor
    rank: int
    ranks: int
    capacity: int
    most: int
    rows: int
    pairs: int

    def counts(self) -> list[int]:
        """The rows of each rank; zeros if something is not as expected. On the CPU."""
        flags = [flags_of(self.control, at, self.ranks) == value for at, value in self.flags]
        at, block, header = self.table
        numbers = self.control[at : at + self.ranks * block].view(torch.int64)
        numbers = numbers.view(self.ranks, -1)[:, header // 8 :]
        experts = self.where.shape[1] - 1
        counts = numbers[:, experts + self.rank]
        pairs = numbers[:, :experts][:, self.where[0, :experts] == self.rank].sum()
        holds = (
            *(flag.all() for flag in flags),
            *((counts >= 0).all(), (counts <= self.most).all()),
            (numbers[:, experts + self.ranks] <= self.capacity).all(),
            0 <= pairs <= self.pairs,
            counts.sum() <= self.rows,
        )
        return counts.tolist() if all(map(bool, holds)) else [0] * self.ranks


def receive_ahead(
    rows: Blocks, packed: Blocks, num_local: int, dtype: torch.dtype, expected: Expected
) -> Received:
    """:func:`receive` before the host has seen the counts.

    Args:
        rows: of tokens.
        packed: expert numbers and weights of K slots for each of them.
        num_local: e.
        dtype: of the weights.
        expected: what the counts are compared with, on the device.

    Returns:
        ``expected.rows`` rows, of which only those that were sent have values; the others choose no
        expert here. Where something is not as expected, it is as if nobody had sent anything.
    """
    slots = packed.row_bytes // (ID_BYTES + dtype.itemsize)
    library = native(rows.memory)
    if library is not None and dtype == torch.float32:
        return Received(
            *library.exchange_receive_ahead(
                *(rows.memory, rows.at, rows.block_bytes, rows.row_bytes, expected.rows),
                *(packed.at, packed.block_bytes, slots, num_local, expected.control),
                *(expected.where, expected.rank, expected.ranks),
                *([number for flag in expected.flags for number in flag], expected.table),
                *(expected.capacity, expected.most, expected.pairs),
            )
        )
    found = receive(rows, expected.counts(), packed, num_local, dtype)
    missing = expected.rows - len(found.rows)
    return Received(
        torch.cat([found.rows, found.rows.new_full((missing, rows.row_bytes), 0xFF)]),
        torch.cat([found.weights, found.weights.new_zeros(missing, slots)]),
        torch.cat([found.keys, found.keys.new_full((missing, slots), num_local)]),
        found.ends,
    )


def sum_of_ranks(rows: Tensor, plan: PairPlan, most: int) -> Tensor:
    """Each token's sum of what ranks sent back for its pairs, in the order of ranks, in fp32.

    Args:
        rows: (R * most, D), of each rank as many as this one sent it, in their order.
        plan: what this one sent.
        most: rows from one rank to the next one.

    Returns:
        (T, D) in the dtype of ``rows``.
    """
    if (library := native(rows, plan.inverse)) is not None:
        return library.exchange_sums(rows, plan.inverse, plan.offsets, most)  # type: ignore[no-any-return]
    begins = torch.nn.functional.pad(plan.offsets[: plan.ranks - 1], (1, 0))
    shifts = torch.arange(plan.ranks, device=rows.device) * most - begins
    by_rank = plan.inverse.view(-1, plan.ranks)
    places = torch.where(by_rank < plan.offsets[plan.ranks - 1], by_rank + shifts, -1)
    return kernels.sum_placed_rows(rows, places.view(-1), plan.ranks)


def of_slots(blocks: Blocks, plan: PairPlan, dtype: torch.dtype) -> Tensor:
    """Each slot's element of the K that its rank sent back for the token's pair.

    Args:
        blocks: rows of K elements, of each rank as many as this one sent it.
        plan: what this one sent.
        dtype: of the elements.

    Returns:
        (T, K), zero for dropped slots.
    """
    if dtype == torch.float32 and (library := native(blocks.memory)) is not None:
        return library.exchange_slots(  # type: ignore[no-any-return]
            *(blocks.memory, blocks.at, blocks.block_bytes),
            *(plan.inverse, plan.offsets, plan.owner),
        )
    ranks, slots = plan.ranks, plan.owner.shape[1]
    end = blocks.at + ranks * blocks.block_bytes
    elements = blocks.memory[blocks.at : end].view(dtype)
    begins = torch.nn.functional.pad(plan.offsets, (1, 0))[:ranks]
    rank = plan.owner.long()
    is_dropped = rank == ranks
    rank = rank.masked_fill(is_dropped, 0)
    row = plan.inverse.view(-1, ranks).gather(1, rank) - begins[rank]
    at = rank * (blocks.block_bytes // dtype.itemsize) + row * slots
    at = (at + torch.arange(slots, device=at.device)).masked_fill(is_dropped, 0)
    if not at.numel():
        return elements.new_empty(at.shape)
    return elements[at].masked_fill_(is_dropped, 0)
