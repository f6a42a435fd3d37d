"""Counts a model's parameters over all ranks, in total and active per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers


@dataclass(frozen=True)
class LayerSize:
    """The experts of one MoE layer.

    Attributes:
        num_experts: E of the whole model.
        num_local_experts: experts on this rank.
        parameters_per_expert: the mean, if experts differ.
        experts_per_token: K; for expert choice the capacity factor, which is the mean number per
            token; E for Soft MoE, whose slots mix all tokens into all experts.
    """

    num_experts: int
    num_local_experts: int
    parameters_per_expert: float
    experts_per_token: float


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, over all ranks.

    ``total = dense + sum of E * parameters_per_expert``, and
    ``active = dense + sum of K * parameters_per_expert`` over the MoE layers: what one token uses.

    Attributes:
        dense: everything but routed experts: attention, routers, shared experts, embeddings.
        lookups: the dense parameters that are only looked up (``nn.Embedding``): a token uses them,
            but not in a GEMM.
        layers: name -> the experts of that layer.
    """

    dense: int
    lookups: int
    layers: Mapping[str, LayerSize]

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        experts = sum(x.num_experts * x.parameters_per_expert for x in self.layers.values())
        return self.dense + round(experts)

    @property
    def active(self) -> int:
        """Parameters that a token uses."""
        used = sum(x.experts_per_token * x.parameters_per_expert for x in self.layers.values())
        return self.dense + round(used)


def model_size(module: nn.Module) -> ModelSize:
    """Counts the parameters of ``module``, whether sharded, partitioned by ZeRO 3, or whole.

    All ranks must call it: if experts differ from each other, their ranks exchange counts.
    """
    layers = dict(expert_layers(module))
    routed = {id(p) for layer in layers.values() for p in layer.experts.parameters()}
    dense = {id(p): numel(p) for p in module.parameters() if id(p) not in routed}
    multiplied = {
        id(p)
        for m in module.modules()
        if not isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    return ModelSize(
        dense=sum(dense.values()),
        lookups=sum(n for key, n in dense.items() if key not in multiplied),
        layers={name: _layer_size(layer) for name, layer in layers.items()},
    )


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, even while ZeRO 3 keeps only a partition of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _layer_size(layer: ExpertLayer) -> LayerSize:
    held = float(sum(map(numel, layer.experts.whole_parameters())))
    counted = layer.num_local_experts
    if layer.is_sharded and not layer.experts.is_stacked:
        # Experts on other ranks may have different sizes.
        device = next((p.device for p in layer.experts.parameters()), torch.device("cpu"))
        total = torch.tensor(held, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=layer.schedule.dispatcher.group.group)  # type: ignore[attr-defined]
        held, counted = float(total), layer.num_experts
    return LayerSize(
        layer.num_experts, layer.num_local_experts, held / counted, _experts_per_token(layer)
    )


def _experts_per_token(layer: ExpertLayer) -> float:
    if layer.top_k is not None:
        return layer.top_k
    factor: float | None = getattr(layer, "capacity_factor", None)
    return layer.num_experts if factor is None else factor
