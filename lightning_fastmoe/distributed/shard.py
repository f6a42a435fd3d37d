"""Shards the experts of a model over the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
from torch import nn

from lightning_fastmoe.distributed.dispatch import ExchangeWait, ExpertGroup, PendingExchange
from lightning_fastmoe.distributed.groups import lasting_group
from lightning_fastmoe.distributed.mesh import ExpertMesh, check_expert_parallel_size
from lightning_fastmoe.distributed.nodes import make_node_groups
from lightning_fastmoe.distributed.schedule import Automatic, schedule_across_ranks
from lightning_fastmoe.distributed.world_batch import WorldBatch
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.dispatch import check_exact
from lightning_fastmoe.nn.expert_layers import KINDS, ExpertLayer, expert_layers
from lightning_fastmoe.nn.partial_state import warn_of_partial_state
from lightning_fastmoe.nn.placement import Placement
from lightning_fastmoe.nn.schedule import LocalSchedule, Schedule


class ExpertSharder:
    """Shards the layers of one model and gives them their schedules; every rank makes one.

    A layer with ``dispatcher="local"`` is not sharded: all its experts stay on every rank and train
    data parallel, like a dense layer.

    Args:
        mesh: the groups of the run.
        nodes: the node of each rank, identical on every rank; None if all are on one.
        timeout: the time limit of a collective in a group made here; None is torch's default.
    """

    def __init__(
        self,
        mesh: ExpertMesh,
        nodes: Sequence[int] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.mesh = mesh
        world = mesh.ep_size * mesh.edp_size
        nodes = [0] * world if nodes is None else nodes
        parts = make_node_groups(mesh.ep_partition, nodes, timeout)
        self.group = ExpertGroup(mesh.ep_group, parts) if mesh.ep_size > 1 else None
        self.batch: WorldBatch | None = None
        if world > 1:
            # Not the world's own group, where other exchanges could interleave.
            group = self.group if mesh.ep_size == world else None
            if group is None:
                alone = mesh.ep_size == 1
                own = mesh.edp_group if alone else lasting_group("global batch", timeout=timeout)
                group = ExpertGroup(own)
            self.batch = WorldBatch(group, mesh, nodes)

    @property
    def automatic(self) -> str | None:
        """What ``dispatcher="auto"`` stands for, and why, once GPUs have been asked."""
        found = None if self.group is None else self.group.shared.get(Automatic)
        return None if found is None else str(found)

    def placement(self, num_experts: int, name: str = "being built") -> Placement | None:
        """The placement of a layer with ``num_experts``; None if this rank keeps all of them.

        Raises:
            TopologyError: if the experts can't be divided equally.
        """
        if self.group is None:
            return None
        world = self.mesh.ep_size * self.mesh.edp_size
        check_expert_parallel_size(self.mesh.ep_size, world, {name: num_experts})
        return Placement(tuple(self.mesh.local_experts(num_experts)))

    def shard(self, module: nn.Module, exact: bool = False) -> None:
        """Reduces every layer of ``module`` that holds all experts to this rank's slice.

        Args:
            module: the model.
            exact: whether all layers must have the bits of one process, not only those that say so.

        Raises:
            TopologyError: if a layer's experts can't be divided, or are already sharded otherwise.
            ConfigError: if a layer must have the bits of one process, and its dispatcher has not.
        """
        for name, layer in expert_layers(module):
            name = name or type(layer).__name__
            if self.batch is not None:
                self.batch.reserve(layer.exchanged_counts)
            local = layer.dispatcher_name == "local"
            placement = None if local else self.placement(layer.num_experts, name)
            schedule: Schedule = LocalSchedule(layer.num_experts)
            if placement is not None:
                if exact or layer.exact:
                    check_exact(layer.dispatcher_name, name)
                if not layer.is_sharded:
                    layer.experts.keep(placement.expert_ids)
                assert self.group is not None
                blocks = self.mesh.placement(layer.num_experts)
                how = (layer.dispatcher_name, self.group, layer.num_experts, blocks)
                schedule = schedule_across_ranks(*how, exact or layer.exact)
            held = tuple(range(layer.num_experts)) if placement is None else placement.expert_ids
            if layer.experts.local_ids != held:
                raise self._sharded_otherwise(name, layer)
            layer.connect(name, self.batch, schedule)
            if layer.is_sharded:
                warn_of_partial_state(layer.experts, name)
        for kind in KINDS:
            kind.guard(module)

    def end_pass(self, layers: Iterable[ExpertLayer], device: torch.device) -> None:
        """Ends a forward pass; all ranks call this after it, before waiting for others elsewhere.

        This detects a rank that skipped the last layers while others wait for it there.

        Args:
            layers: all MoE layers of the model.
            device: the device of the exchange.

        Raises:
            ExchangeError: on every rank, if one is still in an exchange of a layer.
        """
        layers = list(layers)
        sharded = [layer for layer in layers if layer.is_sharded]
        groups: list[ExpertGroup] = []
        if self.batch is not None and any(layer.uses_global_batch for layer in layers):
            groups.append(self.batch.group)
        if self.group is not None and sharded and self.group not in groups:
            groups.append(self.group)
        if not all(layer.uses_global_batch for layer in sharded):
            groups.reverse()  # start with the group of a layer's first exchange, where others wait
        for group in groups:
            group.end_pass(device)

    def meet(self, what: str) -> None:
        """Synchronises all ranks of the run, if their exchanges block the host.

        Args:
            what: this rank's location, for errors.

        Raises:
            ExchangeError: on all ranks, if they are in different places.
        """
        if self.batch is not None and not self.batch.group.is_on_stream:
            none = torch.zeros(self.batch.group.slots, dtype=torch.int64)
            self.batch.group.exchange_counts(none, 0, what)

    def give_up(self) -> None:
        """Tells the other ranks' kernels that this rank leaves the run."""
        if self.group is not None:
            self.group.give_up()

    def record_exchanges(self, pending: PendingExchange, wait: ExchangeWait) -> None:
        """Records all exchanges of this rank in ``pending``, with the deadline of ``wait``."""
        for group in (self.group, self.batch.group if self.batch is not None else None):
            if group is not None:
                group.pending, group.wait = pending, wait

    def _sharded_otherwise(self, name: str, layer: ExpertLayer) -> TopologyError:
        return TopologyError(
            f"Layer {name!r} holds {layer.num_local_experts} of its {layer.num_experts}"
            f" experts from an earlier run; that does not fit expert_parallel_size="
            f"{self.mesh.ep_size}. Rebuild the model, or keep the same expert_parallel_size."
        )
