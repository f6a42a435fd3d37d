"""What the ranks run in test_two_level.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from distributed.dedup_runs import D, E, Rank, poisoned
from distributed.devices import node_of_each_rank, whole_group
from torch import Tensor

from lightning_fastmoe.distributed import (
    ExpertGroup,
    NodeGroups,
    make_expert_mesh,
    make_node_groups,
)
from lightning_fastmoe.distributed.groups import lasting_group
from lightning_fastmoe.distributed.schedule import ACROSS_RANKS
from lightning_fastmoe.distributed.schedule.two_level import TwoLevelDedupSchedule
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn import Schedule
from lightning_fastmoe.testing.schedules import CASES, compare_with_local


def alone() -> NodeGroups:
    """A node that is the only one, or has a single rank; made by hand, as nobody would."""
    nodes = node_of_each_rank()
    every = list(range(len(nodes)))
    singles = [lasting_group("a rank alone", [rank]) for rank in every]
    whole, single = lasting_group("all ranks", every), singles[dist.get_rank()]
    return NodeGroups(whole, single) if len(set(nodes)) == 1 else NodeGroups(single, whole)


@poisoned
def compared(
    placement: list[list[int]],
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[tuple[str, int, int]]]:
    """Values by name, those of all experts on one rank, and (case, rows sent, distinct pairs)."""
    dist.init_process_group("gloo")
    group, nodes = whole_group(), node_of_each_rank()
    is_usual = len(set(nodes)) == 2
    assert (group.nodes is not None) == is_usual
    if not is_usual:
        group = ExpertGroup(group.group, alone())
    found, rows = {}, []
    node_of = torch.empty(E, dtype=torch.int64)
    for rank, ids in enumerate(placement):
        node_of[ids] = nodes[rank]
    here = nodes[group.rank]
    start = group.start
    for name, case in CASES.items():
        sent, pairs = [0], [0]

        def counting(layer, phase, collective, out, x, receive, send, sent=sent):  # type: ignore[no-untyped-def]
            if phase == "dispatch between nodes" and x.is_floating_point():
                sent[0] += sum(n for node, n in enumerate(send) if node != here)
            return start(layer, phase, collective, out, x, receive, send)

        def make(e: int, pairs: list[int] = pairs) -> Schedule:
            schedule = ACROSS_RANKS["dedup"](group, e, placement)
            assert type(schedule) is TwoLevelDedupSchedule
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


@poisoned
def rows_sent() -> tuple[list[tuple[str, int, list[int]]], list[int], list[int]]:
    """(phase, bytes of a row, rows to each) of each exchange, and what two levels should send.

    That is the distinct (token, node) pairs of this rank, by node, and the distinct (token, rank)
    pairs that come to it from all nodes, by rank of its own node.
    """
    rank = Rank("dedup")
    sent = []
    start = rank.group.start

    def noting(layer: str, phase: str, collective: Any, out: Tensor, x: Tensor, *sizes: list[int]):
        receive, send = sizes
        assert (out.shape[0], x.shape[0]) == (sum(receive), sum(send))
        sent.append((phase, x.shape[1] * x.element_size(), send))
        return start(layer, phase, collective, out, x, *sizes)

    rank.group.start = noting  # type: ignore[method-assign]
    given = rank.inputs()
    rank.run(given).square().sum().backward()
    own = [
        {i * rank.world // E for i, kept in zip(ids, used, strict=True) if kept}
        for ids, used in zip(given[1].expert_ids.tolist(), given[1].kept.tolist(), strict=True)
    ]
    everyone: list[Any] = [None] * rank.world
    dist.all_gather_object(everyone, own)
    nodes = node_of_each_rank()
    local = nodes.count(0)
    between = Counter(node for owners in own for node in {nodes[r] for r in owners})
    node, index = divmod(rank.rank, local)
    inside = Counter(
        owner % local
        for source in range(index, rank.world, local)
        for owners in everyone[source]
        for owner in owners
        if owner // local == node
    )
    return (
        sent,
        [between[n] for n in range(len(set(nodes)))],
        [inside[i] for i in range(local)],
    )


ROW = D * 8
SLOTS = 3


def groups_of(nodes: list[int], size: int) -> tuple[list[int], list[int]] | None:
    """The ranks of this rank's parts, with expert parallel groups of that size."""
    dist.init_process_group("gloo")
    made = make_node_groups(make_expert_mesh(size, "cpu").ep_partition, nodes)
    if made is None:
        return None
    return dist.get_process_group_ranks(made.inside), dist.get_process_group_ranks(made.across)


def with_wrong_parts() -> list[str]:
    """The errors that parts of another group, or in another order, give."""
    dist.init_process_group("gloo")
    group = whole_group()
    assert group.nodes is not None
    inside, across = group.nodes.inside, group.nodes.across
    wrong = [NodeGroups(across, inside), NodeGroups(inside, inside), alone_beside(inside)]
    errors = []
    for parts in wrong:
        try:
            TwoLevelDedupSchedule(group, E, [[0, 1], [2, 3], [4, 5], [6, 7]], parts)
        except TopologyError as error:
            errors.append(str(error))
    return errors


def alone_beside(inside: dist.ProcessGroup) -> NodeGroups:
    """A node beside the whole group."""
    return NodeGroups(inside, lasting_group("all ranks", list(range(dist.get_world_size()))))
