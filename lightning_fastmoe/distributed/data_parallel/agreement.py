"""What the ranks must agree about before they reduce gradients, in one exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.distributed.data_parallel.contents import Contents, Item
from lightning_fastmoe.distributed.mesh import ExpertMesh
from lightning_fastmoe.errors import ConfigError, NonFiniteError

_PROBLEM, _NONFINITE, _LARGEST, _SMALLEST, _MOST, _FEWEST, _FLAGS = range(7)
_DRIFTED = (
    "Before the latest step gradients were changed differently on the ranks, after"
    " reduce_gradients(), so the weights that all ranks hold differ now: go on from a checkpoint."
    " torch.nn.utils.clip_grad_norm_ does it, as ranks hold different experts: call clip_grad_norm_"
    " of ExpertDataParallel in its place."
)
_SKIPPED = (
    "Since the last reduce_gradients() the ranks have taken different numbers of optimizer steps,"
    " so the weights that all ranks hold differ now: go on from a checkpoint. torch.amp.GradScaler"
    " skips steps on single ranks, as checks for NaN of your own do: use bf16, and let all ranks"
    " decide together."
)


@dataclass(frozen=True)
class Report:
    """What a rank has to say before gradients are reduced.

    Attributes:
        problem: why it can't go on, or None.
        finite: bool scalar, whether its routers' logits were finite.
        changes: fp32 scalar, not negative, that is identical on all ranks if dense gradients were
            changed identically before the latest step; None if none was.
        steps: how many its optimizers have taken since the last report.
    """

    problem: str | None
    finite: Tensor
    changes: Tensor | None = None
    steps: int = 0


def agree(
    report: Report,
    contents: Contents,
    counts: Sequence[int],
    mesh: ExpertMesh | None,
    device: torch.device,
) -> list[Item]:
    """The parameters that have a gradient on any of the ranks that hold them; collective.

    All ranks see the same flags, so that either all go on or all raise.

    Args:
        report: this rank's.
        contents: the model's parameters.
        counts: number of experts' parameters on each rank of this rank's expert parallel group.
        mesh: the groups; None for a single rank.
        device: the device of the exchange.

    Raises:
        ConfigError: on all ranks, with the problem of the first that has one, or if they have
            changed gradients differently, or taken different numbers of steps.
        NonFiniteError: on all ranks, if a router's logits weren't finite on one.
    """
    parameters = [item for item in contents.parameters if not item.is_expert]
    numbers = {id(item): number for number, item in enumerate(parameters)}
    ep_rank = mesh.ep_rank if mesh is not None else 0
    first = len(parameters) + sum(counts[:ep_rank])
    experts = [item for item in contents.parameters if item.is_expert]
    numbers |= {id(item): number for number, item in enumerate(experts, first)}

    # For each parameter of the whole model: whether a rank has a gradient, whether one froze it.
    size = len(parameters) + sum(counts)
    flags = torch.zeros(_FLAGS + 2 * size, dtype=torch.int32)
    flags[_PROBLEM] = report.problem is not None
    flags[_MOST], flags[_FEWEST] = report.steps, -report.steps
    has, frozen = flags[_FLAGS : _FLAGS + size], flags[_FLAGS + size :]
    for item in contents.parameters:
        number, trained = numbers[id(item)], item.tensor.requires_grad
        has[number] = trained and item.tensor.grad is not None
        frozen[number] = not trained
    flags = flags.to(device)
    flags[_NONFINITE] = ~report.finite
    if report.changes is not None:
        bits = report.changes.view(torch.int32)
        flags[_LARGEST], flags[_SMALLEST] = bits, -bits
    if mesh is not None:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    found = flags.tolist()

    has_any, frozen_any = found[_FLAGS : _FLAGS + size], found[_FLAGS + size :]
    problem = report.problem
    differing = next((n for n in range(size) if has_any[n] and frozen_any[n]), None)
    if differing is not None and problem is None:
        name = next(
            (item.name for item in contents.parameters if numbers[id(item)] == differing), ""
        )
        problem = name and (
            f"{name} is frozen (requires_grad=False) on some ranks only. Freeze the same parameters"
            " on every rank."
        )
    if found[_PROBLEM] or differing is not None:
        raise ConfigError(_first_problem(problem, mesh))
    if found[_LARGEST] != -found[_SMALLEST]:
        raise ConfigError(_DRIFTED)
    if found[_MOST] != -found[_FEWEST]:
        raise ConfigError(_SKIPPED)
    if found[_NONFINITE]:
        raise NonFiniteError(
            "A router's logits contained NaN or Inf on some rank since the last step, so its input"
            " or its weights do. Lower the learning rate or look for the bad batch; to go on"
            " anyway set nonfinite_policy='ignore' of every MoE layer."
        )
    return [item for item in contents.parameters if has_any[numbers[id(item)]]]


def _first_problem(own: str | None, mesh: ExpertMesh | None) -> str:
    """The problem of the first rank that has one."""
    problems = [own]
    if mesh is not None:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, own)
    rank = next(rank for rank, problem in enumerate(problems) if problem)
    return f"{problems[rank]} (rank {rank})" if mesh is not None else str(problems[rank])
