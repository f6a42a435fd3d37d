"""Every class of transformers' experts on several ranks, without a strategy."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from huggingface import experts_classes as classes
from torch import Tensor, nn

from lightning_fastmoe.distributed import ExpertSharder, make_expert_mesh
from lightning_fastmoe.huggingface import choose_dispatcher
from lightning_fastmoe.huggingface.sharded_experts import TransformersLayer, layer_of

EXPERTS = 6


def inputs_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Other tokens on each rank, another number of them, and dropped slots on rank 1."""
    torch.manual_seed(20 + rank)
    x, ids, weights = classes.make_inputs(tokens=11 + 6 * rank)
    if rank == 1:
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.3, EXPERTS)
        ids[::4] = EXPERTS
    return x, ids, weights


def errors_of_all(
    names: list[str], dispatcher: str, on_host: bool, compiled: bool = False
) -> dict[str, dict[str, float]]:
    """Class -> output or gradient -> error of the sharded module, relative to its own forward."""
    before, classes.EXPERTS = classes.EXPERTS, EXPERTS
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    leaves_out = patch.object(TransformersLayer, "leaves_out_dropped", lambda *_: on_host)
    try:
        sharder = ExpertSharder(make_expert_mesh(dist.get_world_size(), "cpu"))
        with leaves_out:
            return {name: errors_of(name, dispatcher, sharder, compiled) for name in names}
    finally:
        classes.EXPERTS = before


def errors_of(
    name: str, dispatcher: str, sharder: ExpertSharder, compiled: bool
) -> dict[str, float]:
    kind = classes.experts_classes()[name]
    torch.manual_seed(3)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": classes.make_experts(kind)})})
    experts = model["mlp"]["experts"]
    wanted: dict[str, Tensor] = {}
    for rank in range(dist.get_world_size()):  # all tokens by transformers' own forward
        found = own_forward(experts, inputs_of(rank))
        tokens = ("out", "hidden_states", "top_k_weights")
        for key, value in found.items():
            if key not in tokens:
                wanted[key] = wanted.get(key, 0) + value
            elif rank == dist.get_rank():
                wanted[key] = value
    choose_dispatcher(model, dispatcher)
    sharder.shard(model)
    layer = layer_of(experts)
    assert layer is not None
    ids = list(layer.experts.local_ids)
    assert len(ids) == EXPERTS // dist.get_world_size()
    if compiled:
        torch._dynamo.reset()
        experts.compile(backend="eager", fullgraph=True)
    found = classes.results(experts, "fastmoe", inputs_of(dist.get_rank()))
    errors = {}
    for key, value in wanted.items():
        twin = value[ids] if key in dict(experts.named_parameters()) else value
        assert found[key].dtype == twin.dtype
        assert twin.abs().max() > 0.01, (name, key)
        errors[key] = float((found[key] - twin).abs().max() / twin.abs().max())
    return errors


def own_forward(experts: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """With dropped slots, which it doesn't know, as weights of zero."""
    x, ids, weights = inputs
    dropped = ids == EXPERTS
    ids, weights = ids.masked_fill(dropped, 0), weights.masked_fill(dropped, 0)
    found = classes.results(experts, "eager", (x, ids, weights))
    found = {key: value.clone() for key, value in found.items()}
    found["top_k_weights"] = found["top_k_weights"].masked_fill(dropped, 0)
    return found
