"""The expert parallel groups of a run, created as soon as their size is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pytorch_lightning.strategies import DeepSpeedStrategy

from lightning_fastmoe.distributed import (
    AutoPlacement,
    ExpertMesh,
    ExpertSharder,
    check_expert_parallel_size,
    make_expert_mesh,
)
from lightning_fastmoe.distributed.expert_checks import divided_experts
from lightning_fastmoe.errors import UnmanagedExpertsError
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.nn.placement import expert_placement
from lightning_fastmoe.strategy.auto_size import AutoSize
from lightning_fastmoe.strategy.nodes import Nodes
from lightning_fastmoe.zero.groups import register_groups


class ExpertGroups:
    """Creates and holds the expert parallel groups; one object per strategy.

    Args:
        strategy: the strategy, with its ranks, device and module.
        own: the strategy's arguments ``expert_parallel_size``, of which "auto" is resolved once a
            layer exists, ``ranks_per_node``, ``tokens_per_rank`` and ``exact``.

    Attributes:
        size: ``expert_parallel_size`` as given.
        sharder: assigns experts to ranks; None until the groups exist.
    """

    def __init__(self, strategy: DeepSpeedStrategy, own: Mapping[str, Any]) -> None:
        self._strategy, self._nodes = strategy, Nodes(strategy, own["ranks_per_node"])
        self.size: int | Literal["auto"] = own["expert_parallel_size"]
        self.sharder: ExpertSharder | None = None
        self._auto = AutoSize(strategy, self._nodes, own["tokens_per_rank"], own["exact"])

    @property
    def mesh(self) -> ExpertMesh:
        """The mesh of expert parallel and expert data parallel groups.

        Raises:
            UnmanagedExpertsError: if the groups don't exist yet.
        """
        if self.sharder is None:
            raise UnmanagedExpertsError(
                "The expert mesh does not exist yet: it is created when the Trainer starts, or with"
                " expert_parallel_size='auto' when configure_model() has built the last MoE layer."
            )
        return self.sharder.mesh

    def wants_sharding(self, found: bool) -> bool:
        """Whether experts that can't be sharded are an error.

        Args:
            found: whether there are layers whose experts can be; without any "auto" resolves to 1,
                which must not go unnoticed.
        """
        auto = self.size == "auto" and self._strategy.world_size > 1
        return self.mesh.ep_size > 1 or (auto and not found)

    def make_if_sized(self) -> None:
        """Creates the groups if their size was given as a number."""
        if self.size != "auto":
            self.make({})

    def make(self, num_experts: Mapping[str, int], size: int | None = None) -> ExpertSharder:
        """Creates the groups unless they exist; every rank calls this.

        Args:
            num_experts: name -> ``num_experts`` of the layers, which the size must divide.
            size: what "auto" has become, if that is settled.

        Raises:
            TopologyError: if a number that was given does not fit.
        """
        strategy = self._strategy
        if self.sharder is None:
            if size is None and self.size != "auto":
                size = self.size
            size = size or self._auto.held() or self._auto.choose(num_experts)
            self._auto.say(size)
            check_expert_parallel_size(size, strategy.world_size, num_experts)
            nodes = self._nodes.of_ranks()
            mesh = make_expert_mesh(size, strategy.root_device.type, strategy._timeout)
            register_groups(mesh)
            self.sharder = ExpertSharder(mesh, nodes, strategy._timeout)
        self._show_mesh()
        return self.sharder

    def _show_mesh(self) -> None:
        """Sets ``module.device_mesh``."""
        if self.sharder is not None and self._strategy.lightning_module is not None:
            self._strategy.lightning_module._device_mesh = self.sharder.mesh.device_mesh

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Around ``configure_model``: MoE layers create only this rank's experts.

        DeepSpeed's zero.Init is not used: it would partition experts over all ranks. Dense
        parameters are partitioned when the engine is built.
        """
        self._show_mesh()
        if self.sharder is not None:
            with expert_placement(self.sharder.placement):
                yield
            return
        strategy, module = self._strategy, self._strategy.lightning_module
        built = divided_experts(expert_layers(module) if module is not None else ()).values()
        auto = AutoPlacement(
            strategy.global_rank,
            strategy.world_size,
            self._nodes.ranks_per_node,
            self._auto,
            built,
        )
        with expert_placement(auto):
            yield
        if auto.built:
            self.make(auto.num_experts, auto.settle())

    def end_pass(self, layers: Iterable[ExpertLayer]) -> None:
        """Joins the exchanges of trailing MoE layers that this rank skipped."""
        if self.sharder is not None:
            self.sharder.end_pass(layers, self._strategy.root_device)
