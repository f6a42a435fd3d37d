"""Checks what DeepSpeed needs identical on every rank, where experts are modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from lightning_fastmoe.errors import ConfigError, ParameterGroupError
from lightning_fastmoe.nn.expert_layers import ExpertLayer


def sharded_module_layers(layers: Mapping[str, ExpertLayer]) -> dict[str, ExpertLayer]:
    """The layers with sharded module experts; the same list on every rank."""
    return {
        name: layer
        for name, layer in layers.items()
        if layer.is_sharded and not layer.experts.is_stacked
    }


def check_same_structure(layers: Mapping[str, ExpertLayer]) -> None:
    """Checks that all ranks have the same sequence of modules, for ZeRO 3; collective.

    DeepSpeed would fail only in the second step, on some of the ranks, and the others would hang.

    Raises:
        ConfigError: on all ranks, naming the layer and the rank.
    """
    own = {
        name: [
            (len(list(module.children())), len(list(module.parameters(recurse=False))))
            for module in layer.experts.modules()
        ]
        for name, layer in sharded_module_layers(layers).items()
    }
    for rank, theirs in enumerate(_of_all_ranks(own)):
        for name in own:
            if theirs[name] != own[name]:
                raise ConfigError(
                    f"The experts of layer {name!r} have different modules or parameters on rank"
                    f" {rank} than on rank {dist.get_rank()}, but ZeRO stage 3 needs the same"
                    " numbers on each. Use stage 1 or 2, or order the list expert=[...] so that"
                    " each rank gets the same kinds."
                )


def check_same_groups(optimizer: Optimizer, layers: Mapping[str, ExpertLayer]) -> None:
    """Checks that optimizer groups match, as DeepSpeed sums norms over ranks; collective.

    Args:
        optimizer: the optimizer, with its groups split into dense and expert groups.
        layers: name -> MoE layer.

    Raises:
        ParameterGroupError: on all ranks, naming the rank.
    """
    own = [bool(group.get("moe")) for group in optimizer.param_groups]
    for rank, theirs in enumerate(_of_all_ranks(own if sharded_module_layers(layers) else None)):
        if theirs != own:
            here = dist.get_rank()
            raise ParameterGroupError(
                f"Rank {rank} trains experts in {sum(theirs)} of the optimizer's groups, rank"
                f" {here} in {sum(own)}, because its experts have no parameters for the others,"
                " or only frozen ones; DeepSpeed needs the same number on each. Order the list"
                " expert=[...] so that each rank has an expert with parameters for each group, or"
                " put the parameters into fewer groups."
            )


def _of_all_ranks(own: Any) -> list[Any]:
    """Every rank's value; an empty list if there is none, which is the same on all ranks."""
    if not own:
        return []
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone
