"""Assigns experts to ranks and exchanges tokens between them."""

from lightning_fastmoe.distributed.auto_placement import AutoPlacement
from lightning_fastmoe.distributed.data_parallel import ExpertDataParallel
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
    check_expert_parallel_size,
    expert_parallel_sizes,
    make_expert_mesh,
)
from lightning_fastmoe.distributed.nodes import NodeGroups, make_node_groups
from lightning_fastmoe.distributed.shard import ExpertSharder

__all__ = [
    "AutoPlacement",
    "EDP_DIM",
    "EP_DIM",
    "EXCHANGE",
    "AllToAllDispatcher",
    "ExchangeWait",
    "ExpertDataParallel",
    "ExpertGroup",
    "ExpertMesh",
    "ExpertSharder",
    "NodeGroups",
    "PendingExchange",
    "check_expert_parallel_size",
    "expert_parallel_sizes",
    "make_expert_mesh",
    "make_node_groups",
]
