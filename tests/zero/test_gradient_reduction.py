"""Gradients are averaged over ranks in any order of arrival, and where some ranks have none."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fastmoe.zero.gradient_reduction import GradientReduction, Reduced

SHAPES = ((3, 4), (30,), (2, 2), (1,), (7, 5), (40,), (2,), (6,))
LIMIT = 20
"""The first, third, fourth and the last two are reduced together."""
USED = (
    (True,) * 8,
    (True, False, True, True, True, False, True, False),
)
"""By each rank; nobody uses the second and the sixth in the second pass."""


def gradient(rank: int, index: int, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * turn + 10 * index + rank)
    return torch.randn(SHAPES[index], generator=generator)


def is_used(rank: int, index: int, turn: int) -> bool:
    return USED[rank][index] and not (turn == 1 and index in (1, 5))


def average(in_process_groups: bool, overlapped: bool) -> list[list[Tensor | None]]:
    """The gradients of two passes as this rank has them afterwards."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair = dist.group.WORLD
    alone = [dist.new_group([r]) for r in range(2)][rank]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    members = [
        Reduced(
            parameter,
            alone if in_process_groups and i % 2 else pair,
            is_kept=(i < 5) == (rank == 0) or i == 4,
        )
        for i, parameter in enumerate(parameters)
    ]
    reduction = GradientReduction(members, 2, LIMIT, overlapped)
    found = []
    for turn in range(2):
        generator = torch.Generator().manual_seed(10 * turn + rank)
        order = torch.randperm(len(SHAPES), generator=generator).tolist()
        for i in filter(lambda i: is_used(rank, i, turn), order):
            parameters[i].grad = gradient(rank, i, turn)
            reduction.take(parameters[i])
        reduction.finish()
        found.append([None if p.grad is None else p.grad.clone() for p in parameters])
        for i in (0, 2, 3, 6):  # reduced together, kept by different ranks
            if (kept := parameters[i].grad) is not None:
                assert kept.untyped_storage().nbytes() == 4 * kept.numel()
        for parameter in parameters:
            parameter.grad = None
    return found


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("in_process_groups", [False, True])
def test_averages_are_those_of_all_ranks(rank_pool, in_process_groups, overlapped):
    results = rank_pool.run(average, 2, in_process_groups, overlapped)
    for rank, turns in enumerate(results):
        for turn, found in enumerate(turns):
            for i, shape in enumerate(SHAPES):
                if not ((i < 5) == (rank == 0) or i == 4):
                    assert found[i] is None
                    continue
                ranks = (rank,) if in_process_groups and i % 2 else (0, 1)
                zero = torch.zeros(shape)
                terms = [gradient(r, i, turn) if is_used(r, i, turn) else zero for r in ranks]
                torch.testing.assert_close(found[i], sum(terms) / 2, rtol=1e-6, atol=1e-7)


def test_a_gradient_is_taken_once_in_a_pass():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    with mock.patch.object(dist, "get_world_size", return_value=1):
        reduction = GradientReduction([Reduced(parameter, None, True)], 1, 10, False)
        reduction.take(parameter)
        with pytest.raises(RuntimeError, match=r"\(3,\) was computed twice in one backward"):
            reduction.take(parameter)
        reduction.finish()
        reduction.take(parameter)  # the next pass
