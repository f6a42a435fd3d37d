"""What the ranks run in test_two_level.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.distributed import ExpertGroup
from lightning_fastmoe.distributed.groups import lasting_group
from lightning_fastmoe.distributed.schedule.two_level import NodeGroups, TwoLevelDedupSchedule
from lightning_fastmoe.nn import Schedule
from lightning_fastmoe.testing.schedules import CASES, compare_with_local


def groups(local: int) -> NodeGroups:
    """This rank's, with nodes of ``local`` ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {}
    for first in range(0, world, local):
        ranks = list(range(first, first + local))
        made = lasting_group("within a node", ranks)
        own["inside"] = made if rank in ranks else own.get("inside")
    for index in range(local):
        ranks = list(range(index, world, local))
        made = lasting_group("between nodes", ranks)
        own["across"] = made if rank in ranks else own.get("across")
    return NodeGroups(**own)


def compared(
    local: int, placement: list[list[int]]
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[tuple[str, int, int]]]:
    """Values by name, those of all experts on one rank, and (case, rows sent, distinct pairs)."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    group, nodes = ExpertGroup(dist.group.WORLD), groups(local)
    found, rows = {}, []
    node_of = torch.empty(8, dtype=torch.int64)
    for rank, ids in enumerate(placement):
        node_of[ids] = rank // local
    here = group.rank // local
    start = group.start
    for name, case in CASES.items():
        sent, pairs = [0], [0]

        def counting(layer, phase, collective, out, x, receive, send, sent=sent):  # type: ignore[no-untyped-def]
            if phase == "dispatch between nodes" and x.is_floating_point():
                sent[0] += sum(n for node, n in enumerate(send) if node != here)
            return start(layer, phase, collective, out, x, receive, send)

        def make(e: int, pairs: list[int] = pairs) -> Schedule:
            schedule = TwoLevelDedupSchedule(group, e, placement, nodes)
            run = schedule.run_routed

            def noting(inputs, routing, experts, layer):  # type: ignore[no-untyped-def]
                if experts.is_stacked and routing.token_ids is None:
                    kept = routing.dispatched
                    for t, ids in enumerate(routing.expert_ids.tolist()):
                        used = [i for k, i in enumerate(ids) if kept is None or bool(kept[t, k])]
                        pairs[0] += len({int(node_of[i]) for i in used} - {here})
                return run(inputs, routing, experts, layer)

            schedule.run_routed = noting  # type: ignore[method-assign]
            return schedule

        group.start = counting  # type: ignore[method-assign]
        values = compare_with_local(make, placement, case, torch.device("cpu"))
        found |= {f"{name}: {key}": pair for key, pair in values.items()}
        rows.append((name, sent[0], pairs[0]))
    return found, rows
