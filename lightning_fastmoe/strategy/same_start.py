"""Makes ranks with different random seeds train the same model.

DeepSpeed broadcasts parameters, but not buffers; and a layer's seed, from which random routing
draws, is that of the process that made the layer. DistributedDataParallel broadcasts buffers, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_fastmoe.distributed.data_parallel.contents import Contents
from lightning_fastmoe.distributed.data_parallel.start import broadcast_tensor
from lightning_fastmoe.distributed.mesh import ExpertMesh
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.expert_layers import ExpertLayer


@torch.no_grad()
def take_start_of_rank_zero(
    module: nn.Module, layers: Mapping[str, ExpertLayer], mesh: ExpertMesh, device: torch.device
) -> None:
    """Takes buffers and layers' seeds from rank 0, and experts' buffers from their first replica.

    A buffer that has another shape or dtype on another rank, such as a cache that grows, stays.

    Args:
        module: the model, on its device.
        layers: name -> MoE layer, of all its MoE layers.
        mesh: the groups.
        device: where collectives work.
    """
    if dist.get_world_size() == 1:
        return
    buffers = {
        item.name: item
        for item in Contents(module, layers).buffers
        if item.tensor.device.type == device.type and item.tensor.layout is torch.strided
    }
    kinds = {name: (item.tensor.shape, item.tensor.dtype) for name, item in buffers.items()}
    seeds = {name: layer._seed for name, layer in layers.items() if isinstance(layer, MoE)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (kinds, seeds))
    for name, seed in everyone[0][1].items():
        layer = layers.get(name)
        if isinstance(layer, MoE):
            layer._seed = seed
    replicas = [int(rank) for rank in mesh.device_mesh.mesh[:, mesh.ep_rank]]
    for name, item in buffers.items():
        ranks = replicas if item.is_expert else range(len(everyone))
        if len(ranks) > 1 and all(everyone[r][0].get(name) == kinds[name] for r in ranks):
            broadcast_tensor(item.tensor, ranks[0], mesh.edp_group if item.is_expert else None)
