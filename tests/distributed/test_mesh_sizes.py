from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_fastmoe.distributed.mesh import (
    ExpertMesh,
    check_expert_parallel_size,
    expert_parallel_sizes,
)
from lightning_fastmoe.errors import TopologyError


@pytest.mark.parametrize(
    ("size", "world", "experts"),
    [(1, 1, {}), (1, 7, {"a": 5}), (2, 4, {"a": 4, "b": 6}), (8, 8, {"a": 64}), (4, 12, {"a": 4})],
)
def test_sizes_that_fit(size, world, experts):
    check_expert_parallel_size(size, world, experts)


@pytest.mark.parametrize(
    ("size", "world", "choices"),
    [(0, 4, "[1, 2, 4]"), (-2, 4, "[1, 2, 4]"), (3, 4, "[1, 2, 4]"), (8, 4, "[1, 2, 4]")],
)
def test_sizes_that_do_not_divide_the_world(size, world, choices):
    with pytest.raises(TopologyError) as error:
        check_expert_parallel_size(size, world, {"a": 24})
    assert f"expert_parallel_size={size} does not divide the world of 4" in str(error.value)
    assert f"{choices}, or 'auto'" in str(error.value)


def test_sizes_that_do_not_divide_the_experts():
    with pytest.raises(TopologyError) as error:
        check_expert_parallel_size(4, 8, {"first": 8, "second": 6})
    assert "does not divide num_experts=6 of layer 'second'" in str(error.value)
    assert "Choose one of [1, 2], or 'auto'" in str(error.value)


@pytest.mark.parametrize(
    ("world", "ranks_per_node", "experts", "want"),
    [
        (1, 1, {"a": 8}, 1),
        (8, 8, {"a": 64}, 8),
        (8, 8, {"a": 4}, 4),
        (8, 8, {"a": 64, "b": 6}, 2),
        (8, 8, {"a": 7}, 1),
        (6, 6, {"a": 9}, 3),
        (8, 8, {}, 1),
        (32, 8, {"a": 64}, 8),
        (32, 1, {"a": 64}, 1),
        (16, 4, {"a": 6, "b": 10}, 2),
        (4, 8, {"a": 8}, 4),
        (12, 6, {"a": 8}, 2),  # groups of 4 would be 0-3, 4-7, ...: the second lies in two nodes
        (24, 6, {"a": 12}, 6),
    ],
)
def test_sizes_for_auto_stay_in_a_node(world, ranks_per_node, experts, want):
    sizes = expert_parallel_sizes(world, ranks_per_node, experts)
    assert sizes[-1] == want
    assert sizes == [size for size in range(1, want + 1) if want % size == 0]
    for size in sizes:
        check_expert_parallel_size(size, world, experts)
        groups = [range(i, i + size) for i in range(0, world, size)]
        assert all(len({rank // ranks_per_node for rank in ranks}) == 1 for ranks in groups)


@pytest.mark.parametrize(("rank", "want"), [(0, range(0, 3)), (2, range(6, 9)), (3, range(9, 12))])
def test_local_experts_are_contiguous_by_rank(rank, want):
    grid = SimpleNamespace(size=lambda dim: (2, 4)[dim], get_local_rank=lambda name: rank)
    mesh = ExpertMesh(grid)
    assert (mesh.ep_size, mesh.edp_size) == (4, 2)
    assert mesh.local_experts(12) == want
