"""Saves and restores the MoE layers' counts since the last optimizer step.

They matter if a save falls between the micro-batches of a step: the tokens of each expert, from
which the balance bias is updated, and whether NaN or Inf reached the router. Each rank counts its
own tokens; the step adds up all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lightning_fastmoe.checkpoint.format.manifest import Topology
from lightning_fastmoe.checkpoint.format.state_files import COUNTS
from lightning_fastmoe.nn import Router
from lightning_fastmoe.nn.expert_layers import ExpertLayer


class RankStates(Protocol):
    """The part of a checkpoint source that this module needs."""

    @property
    def topology(self) -> Topology | None:
        """The topology of the run that saved."""
        ...

    def read_rank_state(self, rank: int, *, trusted: bool = False) -> dict[str, Any] | None:
        """The state that only this rank saved."""
        ...


def counts_of(layers: Mapping[str, ExpertLayer]) -> dict[str, Any]:
    """This rank's counts, as JSON values."""
    return {
        name: {
            "load": load.tolist() if (load := _load_of(layer)) is not None else None,
            "nonfinite": layer.nonfinite.found,
        }
        for name, layer in layers.items()
    }


def restore_counts(
    source: RankStates, layers: Mapping[str, ExpertLayer], rank: int, world_size: int, trusted: bool
) -> None:
    """Restores the counts: each rank its own; on another number of ranks, rank 0 gets them all.

    Checkpoints of earlier versions have no counts.

    Args:
        source: the checkpoint.
        layers: name -> MoE layer.
        rank: this rank.
        world_size: the number of ranks of this run.
        trusted: see :meth:`RankStates.read_rank_state`.
    """
    saved_world = source.topology.world_size if source.topology is not None else 0
    own = [rank] if saved_world == world_size else []
    ranks = own or (range(saved_world) if rank == 0 else [])
    states = [source.read_rank_state(r, trusted=trusted) for r in ranks]
    saved = [state[COUNTS] for state in states if state is not None and COUNTS in state]
    for name, layer in layers.items():
        rows = [counts[name] for counts in saved if name in counts]
        load = _load_of(layer)
        if load is not None:
            load.zero_()
            for row in rows:
                if row["load"] is not None and len(row["load"]) == load.numel():
                    load += torch.tensor(row["load"], dtype=load.dtype, device=load.device)
        if any(row["nonfinite"] for row in rows):
            layer.nonfinite.put()


def _load_of(layer: ExpertLayer) -> torch.Tensor | None:
    router = getattr(layer, "router", None)
    return router.load_since_update if isinstance(router, Router) else None
