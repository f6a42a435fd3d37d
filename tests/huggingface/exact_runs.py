"""What the ranks run in test_exact.py."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from huggingface import experts_classes as classes
from huggingface.sharding_runs import Run, run_case
from strategy.models import Trace
from torch import Tensor, nn

from lightning_fastmoe.distributed import ExpertSharder, make_expert_mesh, schedule
from lightning_fastmoe.distributed.schedule.exact import ExactSchedule
from lightning_fastmoe.huggingface import choose_dispatcher

CLASSES = ("Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts")
"""Fused, with biases and an activation of its own, and without a gate."""
EXPERTS, TOP_K, WIDTH = 8, 3, 32
"""Of the layers; rows of whole cache lines, as some products on CPUs depend on their alignment."""


def train(dispatcher: str, run: Run) -> tuple[Trace, int]:
    """The run, and how many layers were exact."""
    made: list[ExactSchedule] = []
    real = ExactSchedule.__init__

    def noting(self: ExactSchedule, *args: object) -> None:
        made.append(self)
        real(self, *args)

    with (
        patch.object(schedule, "AUTO", dispatcher),
        patch.object(ExactSchedule, "__init__", noting),
    ):
        return run_case(run), len(made)


def unequal(name: str, dispatcher: str, exact: bool) -> list[str]:
    """Output and gradients, in bf16, that don't have the bits of one process."""
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        with patch.object(classes, "EXPERTS", EXPERTS):
            experts = classes.make_experts(
                classes.experts_classes()[name], torch.bfloat16, d_model=WIDTH, d_ffn=WIDTH
            )
        models.append(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})}))
    given = [inputs_of(r) for r in range(world)]
    together = [torch.cat(parts) for parts in zip(*given, strict=True)]
    begin = sum(len(one[0]) for one in given[:rank])
    mine = slice(begin, begin + len(given[rank][0]))
    right = results(models[0], together)
    choose_dispatcher(models[1], dispatcher, exact=exact)
    ExpertSharder(make_expert_mesh(world, "cpu")).shard(models[1])
    found = results(models[1], given[rank])
    return [key for key in found if not torch.equal(found[key], right[key][mine])]


def inputs_of(rank: int) -> list[Tensor]:
    """Tokens, another number of them on each rank; experts, weights and the output's gradient."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 31 + 6 * rank
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K, dim=1).indices
    x, upstream = (torch.randn(tokens, WIDTH, generator=generator).bfloat16() for _ in range(2))
    return [x, ids, torch.rand(tokens, TOP_K, generator=generator), upstream]


def results(model: Any, given: list[Tensor]) -> dict[str, Tensor]:
    """Output and gradients of the model's experts."""
    x, ids, weights, upstream = given
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = model["mlp"]["experts"](x, ids, weights)
    out.backward(upstream)
    return {"output": out.detach(), "x": x.grad, "weights": weights.grad}
