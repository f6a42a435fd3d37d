"""What the ranks run in test_schedules.py, and on GPUs in its twin."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed.devices import join
from torch import Tensor

from lightning_fastmoe.distributed import (
    AllToAllDispatcher,
    ExchangeWait,
    ExpertGroup,
    ExpertSharder,
    make_expert_mesh,
)
from lightning_fastmoe.distributed.schedule import schedule_across_ranks
from lightning_fastmoe.nn import MoE, SequentialSchedule
from lightning_fastmoe.nn.dispatch import DISPATCHERS
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.testing.schedules import CASES, D, E, F, compare_with_local

PLACEMENTS = {
    "equal blocks": lambda world: equal_blocks(E, world),
    "every second expert": lambda world: [range(rank, E, world) for rank in range(world)],
    "unequal": lambda world: [(rank,) for rank in range(world - 1)] + [range(world - 1, E)],
}

Results = dict[str, dict[str, tuple[Tensor, Tensor]]]


def compared(
    name: str, placement: str, device_type: str, dtype: torch.dtype, exact: bool = False
) -> Results:
    """Case -> what was computed, by the schedule and on one rank."""
    device, group = join(device_type)
    placed = PLACEMENTS[placement](group.size)
    # Shorter than ranks are late: a schedule must live through waits in slices.
    group.wait = ExchangeWait(look=2e-3)
    return {
        case: compare_with_local(
            lambda experts: schedule_across_ranks(name, group, experts, placed, exact),
            placed,
            CASES[case],
            device,
            dtype,
        )
        for case in CASES
    }


def with_a_collective_of_its_own() -> tuple[list[str], dict[str, tuple[Tensor, Tensor]]]:
    """The phases in which it moved rows, and what was computed."""
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    group = ExpertGroup(dist.group.WORLD)
    phases = []

    def noting(*args, **kwargs):
        _, pending, name = group.pending.read()
        assert pending
        phases.append(name.removeprefix("a layer, phase "))
        return dist.all_to_all_single(*args, **kwargs)

    class Own(AllToAllDispatcher):
        collective = staticmethod(noting)

    blocks = equal_blocks(E, 2)
    found = compare_with_local(
        lambda experts: SequentialSchedule(Own(group, experts)),
        blocks,
        CASES["plain"],
        torch.device("cpu"),
    )
    return phases, found


def with_every_dispatcher() -> dict[str, bool]:
    """Dispatcher -> whether a layer on ranks that all hold all experts equals a plain one."""
    dist.init_process_group("gloo")
    sharder = ExpertSharder(make_expert_mesh(1, "cpu"))
    found = {}
    for name in DISPATCHERS:
        torch.manual_seed(0)
        layer = MoE(D, F, E, dispatcher=name)
        plain = MoE(D, F, E)
        plain.load_state_dict(layer.state_dict())
        sharder.shard(torch.nn.ModuleList([layer]))
        x = torch.randn(7, D)
        found[name] = torch.equal(layer(x), plain(x))
    return found
