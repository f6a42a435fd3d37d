"""The global batch over all ranks of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.distributed.dispatch.counts import ExpertGroup
from lightning_fastmoe.distributed.mesh import ExpertMesh
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.global_batch import RESERVED_TOP_K
from lightning_fastmoe.nn.placement import equal_blocks


class WorldBatch:
    """A :class:`~lightning_fastmoe.nn.global_batch.GlobalBatch` of all ranks of the world.

    Every exchange carries its layer and number, which are checked like the counts of an expert
    parallel group. That reads from the device once.

    Args:
        group: the group of all ranks; the expert parallel group itself if that has all ranks.
        mesh: the groups of the run.
        nodes: the node of each rank.
    """

    def __init__(self, group: ExpertGroup, mesh: ExpertMesh, nodes: Sequence[int]) -> None:
        self.group = group
        self.rank, self.size = self.group.rank, self.group.size
        self.num_expert_ranks = mesh.ep_size
        self._nodes = torch.tensor(nodes)
        self._first_rank = self.rank - mesh.ep_rank

    def reserve(self, counts: int) -> None:
        """Reserves room for count vectors of this length; all ranks call it before any exchange."""
        self.group.slots = max(self.group.slots, counts)

    def gather_counts(self, counts: Tensor, layer: str) -> Tensor:
        """See :class:`~lightning_fastmoe.nn.global_batch.GlobalBatch`; the table is on the CPU.

        Raises:
            ExchangeError: on all ranks, if they disagree about the exchange.
            ConfigError: if there are more counts than :meth:`reserve` made room for.
        """
        if counts.numel() > self.group.slots:
            raise ConfigError(
                f"{layer}: {counts.numel()} counts are to be exchanged over all ranks, but the run"
                f" started with room for {self.group.slots}. A callback can't raise top_k above"
                f" {RESERVED_TOP_K} or switch to capacity_over='global' during training: start"
                " training with these settings."
            )
        return self.group.exchange_counts(counts, counts.numel(), layer)

    def gather_rows(self, rows: Tensor, layer: str) -> tuple[Tensor, int]:
        """See :class:`~lightning_fastmoe.nn.global_batch.GlobalBatch`.

        Raises:
            ExchangeError: on all ranks, if they disagree about the exchange.
        """
        own = torch.full((1,), rows.shape[0], dtype=torch.int64, device=rows.device)
        lengths = self.gather_counts(own, layer)[:, 0].tolist()
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        self.group.run(layer, "rows of the global batch", dist.all_gather, parts, padded)
        everyone = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
        return everyone, sum(lengths[: self.rank])

    def near_experts(self, num_experts: int) -> Tensor:
        """See :class:`~lightning_fastmoe.nn.global_batch.GlobalBatch`."""
        blocks = equal_blocks(num_experts, self.num_expert_ranks)
        owner = torch.empty(num_experts, dtype=torch.int64)
        for rank, ids in enumerate(blocks, self._first_rank):
            owner[list(ids)] = rank
        return self._nodes[owner] == self._nodes[self.rank]
