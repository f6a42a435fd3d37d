"""``expert_parallel_size="auto"`` of a run: what fits into the memory of its devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn

from lightning_fastmoe.distributed import expert_parallel_sizes
from lightning_fastmoe.distributed.expert_checks import divided_experts
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.planning.parallel_size import (
    SizeChoice,
    buffers_at,
    bytes_at,
    smallest_that_fits,
)
from lightning_fastmoe.strategy.nodes import Nodes


class AutoSize:
    """Chooses the size, the same on all ranks.

    Args:
        strategy: the strategy, with its ranks, device and module.
        nodes: which ranks share one.
        tokens: of a rank's micro-batch, as the user says; None if unknown.
        exact: whether all layers must have the bits of one process, not only those that say so.
    """

    def __init__(
        self, strategy: DeepSpeedStrategy, nodes: Nodes, tokens: int | None, exact: bool
    ) -> None:
        self._strategy, self._nodes, self._tokens = strategy, nodes, tokens
        self._exact = exact
        self._choice: SizeChoice | None = None

    def choose(self, num_experts: Mapping[str, int]) -> int:
        """The expert parallel size of a model that is built; every rank calls this.

        On the CPU, which is for trying things out, it is the largest possible one.

        Args:
            num_experts: name -> ``num_experts`` of the layers, which the size must divide.
        """
        strategy = self._strategy
        sizes = expert_parallel_sizes(strategy.world_size, self._nodes.ranks_per_node, num_experts)
        memory = device_memory(strategy.root_device)
        if memory is None or len(sizes) == 1:
            return sizes[-1]
        module = strategy.lightning_module
        assert module is not None
        assert isinstance(strategy.config, dict)
        zero = strategy.config["zero_optimization"]
        itemsize = strategy.precision_plugin._desired_dtype.itemsize  # type: ignore[attr-defined]
        layers = self.layers()
        needed = bytes_at(
            module,
            layers,
            sizes,
            world=strategy.world_size,
            stage=zero["stage"],
            itemsize=itemsize,
            config=zero,
        )
        buffers = buffers_at(
            layers, sizes, tokens=self._tokens, itemsize=itemsize, exact=self._exact
        )
        # The least memory and the largest needs of all ranks, which must not choose differently.
        least, *most = self._maximum([-memory, *needed, *buffers])
        count = len(sizes)
        self._choice = smallest_that_fits(sizes, most[:count], most[count:], -least)
        return self._choice.size

    def held(self) -> int | None:
        """The size for which an earlier run has sharded the model; None if none has."""
        sizes = {
            layer.num_experts // layer.num_local_experts
            for layer in self.layers()
            if layer.num_local_experts < layer.num_experts
        }
        return sizes.pop() if len(sizes) == 1 else None

    def say(self, size: int) -> None:
        """Prints, once, which size was taken and why, where memory had a say."""
        choice, self._choice = self._choice, None
        if choice is None:
            return
        if choice.size == size:
            rank_zero_info(str(choice))
            return
        rank_zero_info(
            f"expert_parallel_size='auto' is {size}, although {choice.size} would fit: while the"
            " model was built, experts were changed or copied, or they are modules. A number would"
            " be taken as it is."
        )

    def agree(self, holds: bool) -> bool:
        """Whether it holds on all ranks."""
        return self._strategy.world_size == 1 or self._maximum([int(not holds)]) == [0]

    def layers(self) -> list[ExpertLayer]:
        """The model's layers whose experts are divided over ranks."""
        layers = dict(expert_layers(self._strategy.lightning_module or nn.Module()))
        return [layers[name] for name in divided_experts(layers.items())]

    def _maximum(self, numbers: list[int]) -> list[int]:
        found = torch.tensor(numbers, dtype=torch.int64, device=self._strategy.root_device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(number) for number in found.tolist()]


def device_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory; None for the CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
