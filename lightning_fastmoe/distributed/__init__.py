"""Assigns experts to ranks and exchanges tokens between them."""

from lightning_fastmoe.distributed.auto_placement import AutoPlacement
from lightning_fastmoe.distributed.dispatch import (
    EXCHANGE,
    AllToAllDispatcher,
    ExchangeWait,
    ExpertGroup,
    PendingExchange,
)
from lightning_fastmoe.distributed.mesh import (
    EDP_DIM,
    EP_DIM,
    ExpertMesh,
    make_expert_mesh,
    resolve_expert_parallel_size,
)
from lightning_fastmoe.distributed.shard import ExpertSharder

__all__ = [
    "AutoPlacement",
    "EDP_DIM",
    "EP_DIM",
    "EXCHANGE",
    "AllToAllDispatcher",
    "ExchangeWait",
    "ExpertGroup",
    "ExpertMesh",
    "ExpertSharder",
    "PendingExchange",
    "make_expert_mesh",
    "resolve_expert_parallel_size",
]
