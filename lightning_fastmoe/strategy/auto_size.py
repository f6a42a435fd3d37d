"""``expert_parallel_size="auto"`` of a run: what fits into the memory of its devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn

from lightning_fastmoe.distributed import expert_parallel_sizes
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.planning.parallel_size import SizeChoice, smallest_that_fits
from lightning_fastmoe.strategy.nodes import Nodes
from lightning_fastmoe.zero.groups import divided_experts


class AutoSize:
    """Chooses the size, alike on all ranks.

    Args:
        strategy: the strategy, with its ranks, device and module.
        nodes: those of the run.
    """

    def __init__(self, strategy: DeepSpeedStrategy, nodes: Nodes) -> None:
        self._strategy, self._nodes = strategy, nodes

    def choose(self, num_experts: Mapping[str, int]) -> int:
        """The expert parallel size of a model that is built; every rank calls this.

        On the CPU, which is for trying things out, it is the largest possible one.

        Args:
            num_experts: name -> ``num_experts`` of the layers, which the size must divide.
        """
        strategy, per_node = self._strategy, self._nodes.ranks_per_node
        sizes = expert_parallel_sizes(strategy.world_size, per_node, num_experts)
        memory = device_memory(strategy.root_device)
        if memory is None or len(sizes) == 1:
            return sizes[-1]
        choice = self._by_memory(sizes, _smallest(memory, strategy.root_device))
        rank_zero_info(str(choice))
        return choice.size

    def layers(self) -> list[ExpertLayer]:
        """The model's layers whose experts are divided over ranks."""
        layers = dict(expert_layers(self._strategy.lightning_module or nn.Module()))
        return [layers[name] for name in divided_experts(layers.items())]

    def _by_memory(self, sizes: list[int], memory: int) -> SizeChoice:
        strategy = self._strategy
        module = strategy.lightning_module
        assert module is not None
        assert isinstance(strategy.config, dict)
        zero = strategy.config["zero_optimization"]
        return smallest_that_fits(
            module,
            self.layers(),
            sizes,
            world=strategy.world_size,
            memory=memory,
            stage=zero["stage"],
            itemsize=strategy.precision_plugin._desired_dtype.itemsize,  # type: ignore[attr-defined]
            config=zero,
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory; None for the CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def _smallest(memory: int, device: torch.device) -> int:
    """The least over all ranks, which must not choose differently."""
    least = torch.tensor(memory, dtype=torch.int64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
