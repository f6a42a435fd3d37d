"""What a rank sends where when each token goes once to each rank with some of its experts.

A *pair* is a (token, rank), number ``t * R + r``; pairs are sorted by rank, then by token. Nothing
here waits for the device. The functions are the kernels of csrc/exchange/plan.cu and their twins.

T tokens, K slots per token, E experts, R ranks; S pairs are sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fastmoe.ops.native import native
from lightning_fastmoe.ops.routing import order_by_expert

_ID_BYTES = 4


@dataclass(frozen=True)
class PairPlan:
    """Which tokens go to which ranks.

    Attributes:
        counts: (E + R,) int64, the tokens of each expert, then the pairs of each rank.
        order: (T*R,) int64, pairs by rank; those that aren't sent come last.
        ends: (R,) int32, where each rank's pairs end in ``order``.
    """

    counts: Tensor
    order: Tensor
    ends: Tensor
    _inverse: Tensor
    _offsets: Tensor  # (R + 1,)
    _owner: Tensor

    def places(self, most: int) -> tuple[Tensor, Tensor]:
        """Where a rank finds what comes back for its pairs.

        Args:
            most: the rows from each rank that there is room for.

        Returns:
            ``places (T*R,)`` int64, each pair's row; ``slot_places (T*K,)`` int64, each slot's
            element among the K elements of each of the S pairs. -1 where nothing was sent.
        """
        inverse, offsets, owner = self._inverse, self._offsets, self._owner
        if (library := native(inverse)) is not None:
            return library.exchange_places(inverse, offsets, owner, most)  # type: ignore[no-any-return]
        ranks, slots = len(offsets) - 1, owner.shape[1]
        begins = torch.nn.functional.pad(offsets[: ranks - 1], (1, 0))
        shifts = torch.arange(ranks, device=inverse.device) * most - begins
        by_rank = inverse.view(-1, ranks)
        places = torch.where(by_rank < offsets[ranks - 1], by_rank + shifts, -1)
        padded = torch.nn.functional.pad(by_rank, (0, 1), value=-1)  # where dropped slots look
        row = padded.gather(1, owner.long())
        slot = row * slots + torch.arange(slots, device=row.device)
        return places.view(-1), torch.where(row < 0, -1, slot).view(-1)


def plan_pairs(
    chosen: Tensor, where: Tensor, weights: Tensor, ranks: int
) -> tuple[PairPlan, Tensor]:
    """Plans what is sent.

    Args:
        chosen: (T, K) int64, experts; E for dropped slots.
        where: (2, E + 1) int64, each expert's rank and its number there; R and -1 for E.
        weights: (T, K).
        ranks: R.

    Returns:
        The plan; and ``packed (T*R, b)`` uint8, what travels with a pair that is sent: for each
        slot int32, its expert's number on that rank or -1 if it is another's, then the slots'
        weights. Apart from the plan, which the backward pass keeps.
    """
    library = native(chosen, weights)
    if library is not None and weights.dtype == torch.float32:
        keys, packed, owner, of_experts = library.exchange_pairs(
            chosen.contiguous(), where, weights.contiguous(), ranks
        )
    else:
        keys, packed, owner, of_experts = _pairs(chosen, where, weights, ranks)
    pairs = order_by_expert(keys, ranks + 1)
    counts = torch.cat([of_experts, pairs.tokens_per_expert[:ranks]])
    ends = pairs.offsets[:ranks]
    return PairPlan(counts, pairs.order, ends, pairs.inverse, pairs.offsets, owner), packed


def _pairs(
    chosen: Tensor, where: Tensor, weights: Tensor, ranks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, slots), num_experts = chosen.shape, where.shape[1] - 1
    owner, local = where[0][chosen], where[1][chosen]
    every = torch.arange(ranks, device=chosen.device)
    needed = (owner.unsqueeze(2) == every).any(1)
    here = owner.unsqueeze(1) == every.view(1, -1, 1)
    ids = torch.where(here, local.unsqueeze(1), -1).to(torch.int32)
    wide = weights.unsqueeze(1).expand(here.shape).contiguous()
    bytes_of = [part.view(tokens * ranks, slots).view(torch.uint8) for part in (ids, wide)]
    counts = order_by_expert(chosen, num_experts + 1).tokens_per_expert[:-1]
    keys = torch.where(needed, every, ranks).view(-1)
    return keys, torch.cat(bytes_of, dim=1), owner.to(torch.int32), counts


def unpack_pairs(
    memory: Tensor,
    at: int,
    block_bytes: int,
    ends: Tensor,
    counts: list[int],
    slots: int,
    num_local: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Reads what came with the pairs, as :func:`plan_pairs` packed it.

    Args:
        memory: (B,) uint8.
        at: the byte at which the first rank's begin.
        block_bytes: bytes from one rank's to the next one's.
        ends: (R,) int32, where each rank's rows end, on the device of the memory.
        counts: the same on the host: the rows of each rank, S' together.
        slots: K.
        num_local: e.
        dtype: of the weights.

    Returns:
        ``weights (S', K)`` and ``keys (S', K)`` int64: the local expert of each slot, e for those
        of other ranks.
    """
    rows = sum(counts)
    library = native(memory)
    if library is not None and dtype == torch.float32:
        return library.exchange_unpack(  # type: ignore[no-any-return]
            memory, at, block_bytes, ends, rows, slots, num_local
        )
    width = slots * (_ID_BYTES + dtype.itemsize)
    blocks = [
        memory[at + rank * block_bytes :][: count * width].view(count, width)
        for rank, count in enumerate(counts)
    ]
    ids, weights = (
        part.clone(memory_format=torch.contiguous_format)
        for part in torch.cat(blocks).tensor_split([slots * _ID_BYTES], dim=1)
    )
    keys = ids.view(torch.int32).long()
    return weights.view(dtype), torch.where(keys < 0, num_local, keys)
