"""What the ranks run in test_schedules.py, and on GPUs in its twin."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.distributed import AllToAllDispatcher, ExpertGroup
from lightning_fastmoe.nn import SequentialSchedule
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.testing.schedules import CASES, E, compare_with_local

SCHEDULES = {
    "all_to_all": lambda group, experts, placement: SequentialSchedule(
        AllToAllDispatcher(group, experts, placement)
    ),
}
"""Every schedule that crosses ranks, one line each."""

PLACEMENTS = {
    "equal blocks": lambda world: equal_blocks(E, world),
    "every second expert": lambda world: [range(rank, E, world) for rank in range(world)],
    "unequal": lambda world: [(rank,) for rank in range(world - 1)] + [range(world - 1, E)],
}

Results = dict[str, dict[str, tuple[Tensor, Tensor]]]


def compared(name: str, placement: str, device_type: str, dtype: torch.dtype) -> Results:
    """Case -> what was computed, by the schedule and on one rank."""
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    world = dist.group.WORLD
    assert world is not None
    placed = PLACEMENTS[placement](dist.get_world_size())
    group = ExpertGroup(world)
    return {
        case: compare_with_local(
            lambda experts: SCHEDULES[name](group, experts, placed),
            placed,
            CASES[case],
            device,
            dtype,
        )
        for case in CASES
    }
