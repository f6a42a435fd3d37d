"""Plans a training run of FastMoEStrategy: bytes of a rank by expert parallel size, and what fits.

Weights, gradients and optimizer are those of :mod:`~lightning_fastmoe.planning.memory`; activations
are counted elsewhere, by the shapes of a model. Routing is taken to be balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_fastmoe.distributed import expert_parallel_sizes
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.planning.memory import MemoryPlan, plan
from lightning_fastmoe.planning.offload_sizes import GIGABYTE
from lightning_fastmoe.planning.parallel_size import ADAM, groups_at
from lightning_fastmoe.planning.sizes import ModelSize, model_size


@dataclass(frozen=True)
class Activations:
    """Bytes that a rank keeps between a micro-batch's forward and backward pass.

    Attributes:
        layers: of each layer of the model, all experts on one rank.
        outside: of what is outside of layers, but for logits.
        logits: at the peak of the loss.
        hidden: of one hidden state of all tokens, which is what checkpointing keeps of a layer.
        top_k: experts per token of each layer with experts.
    """

    layers: tuple[int, ...]
    outside: int
    logits: int
    hidden: int
    top_k: tuple[int, ...]

    def kept(self, size: int) -> int:
        """Without checkpointing, at an expert parallel size."""
        exchanged = sum(self._received(k, size) for k in self.top_k)
        return sum(self.layers) + exchanged + self.outside + self.logits

    def checkpointed(self, size: int) -> int:
        """With each layer checkpointed: inputs of all, and the largest one computed again."""
        exchanged = max((self._received(k, size) for k in self.top_k), default=0)
        again = max(self.layers, default=0) + exchanged
        return len(self.layers) * self.hidden + self.outside + max(again, self.logits)

    def _received(self, top_k: int, size: int) -> int:
        """Bytes of the tokens that a rank receives, each once from the rank that has it.

        Routed at random, a token reaches ``R (1 - (1 - 1/R)^K)`` of R ranks.
        """
        return 0 if size == 1 else round(self.hidden * size * (1 - (1 - 1 / size) ** top_k))


@dataclass(frozen=True)
class SizePlan:
    """One expert parallel size.

    Attributes:
        size: the expert parallel size.
        memory: weights, gradients, optimizer and buffers.
        activations: bytes without and with checkpointing; None if they are unknown.
    """

    size: int
    memory: MemoryPlan
    activations: tuple[int, int] | None

    def needed(self, *, checkpointed: bool) -> int:
        """Bytes on the device; without activations where these are unknown."""
        held = self.memory.total.device
        return held + (self.activations[checkpointed] if self.activations else 0)


@dataclass(frozen=True)
class TrainingPlan:
    """All sizes.

    Attributes:
        model: its parameters.
        sizes: a plan for each possible size, ascending.
        gpu_memory: bytes of a device.
        run: GPUs, stage, precision and tokens, for people.
    """

    model: ModelSize
    sizes: tuple[SizePlan, ...]
    gpu_memory: int
    run: str

    def smallest(self, *, checkpointed: bool) -> SizePlan | None:
        """The smallest size that fits, with or without checkpointing; None if none does."""
        return next(
            (x for x in self.sizes if x.needed(checkpointed=checkpointed) <= self.gpu_memory), None
        )

    def check(self) -> None:
        """Refuses a run that fits at no size.

        Raises:
            ConfigError: with the missing bytes.
        """
        if self.smallest(checkpointed=True) is not None:
            return
        least = min(self.sizes, key=lambda one: one.needed(checkpointed=True))
        needed = least.needed(checkpointed=True)
        also = ", even with activation checkpointing" if least.activations else ""
        raise ConfigError(
            f"Each GPU lacks {_gb(needed - self.gpu_memory)}: expert_parallel_size={least.size}"
            f" needs the least{also}, {_gb(needed)}, and there are {_gb(self.gpu_memory)}. Use more"
            " GPUs, a higher stage, fewer tokens per GPU, or offload the optimizer."
        )

    def text(self) -> str:
        """The plan for people."""
        experts = self.model.total - self.model.dense
        lines = [
            f"{self.run}; {self.model.total / 1e9:.1f} B parameters, {experts / 1e9:.1f} B of them"
            " in experts",
            "expert parallel   weights  gradients  optimizer   buffers  activations      sum"
            "  checkpointed      sum",
        ]
        for one in self.sizes:
            held = one.memory.total
            parts = (held.weights, held.gradients, held.optimizer, held.buffers)
            cells = [
                f"{one.size:>15}",
                *(
                    _gb(part).rjust(width)
                    for part, width in zip(parts, (10, 11, 11, 10), strict=True)
                ),
            ]
            for checkpointed, width in ((False, 13), (True, 14)):
                kept = _gb(one.activations[checkpointed]) if one.activations else "unknown"
                cells += [kept.rjust(width), _gb(one.needed(checkpointed=checkpointed)).rjust(9)]
            lines.append("".join(cells))
        for checkpointed in (False, True):
            found = self.smallest(checkpointed=checkpointed)
            how = "with checkpointing" if checkpointed else "without checkpointing"
            if found is None:
                lines.append(f"{how}, no size fits into {_gb(self.gpu_memory)}")
            else:
                lines.append(
                    f"{how}, expert_parallel_size={found.size} is the smallest that fits:"
                    f" {_gb(found.needed(checkpointed=checkpointed))} of {_gb(self.gpu_memory)}"
                )
        lines.append(
            "Not included: ZeRO's temporary copies of gradients and, in stage 3, gathered weights;"
            " what uneven routing adds."
        )
        if self.sizes[0].activations is None:
            lines.append("Activations are unknown, as this model can't run on shapes alone.")
        return "\n".join(lines) + "\n"


def training_plan(
    model: nn.Module,
    activations: Activations | None,
    *,
    gpus: int,
    gpus_per_node: int,
    gpu_memory: int,
    itemsize: int,
    zero: Mapping[str, Any],
    run: str,
) -> TrainingPlan:
    """Plans a run with Adam at each possible size.

    Args:
        model: the whole model, which may be on the meta device.
        activations: what a rank keeps of its micro-batch; None if unknown.
        gpus: ranks.
        gpus_per_node: ranks that share a node, in which an expert parallel group stays.
        gpu_memory: bytes of a device.
        itemsize: bytes of a weight.
        zero: DeepSpeed's ``zero_optimization``.
        run: what it is, for people.

    Raises:
        ConfigError: if ``gpus_per_node`` does not divide ``gpus``, or there are no experts.
    """
    if gpus < 1 or gpus_per_node < 1 or gpus % gpus_per_node:
        raise ConfigError(
            f"{gpus} GPUs can't be on nodes of {gpus_per_node}: use numbers of which the second"
            " divides the first."
        )
    layers = dict(expert_layers(model))
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no experts that could be sharded.")
    numbers = {name: layer.num_experts for name, layer in layers.items()}
    plans = []
    for size in expert_parallel_sizes(gpus, gpus_per_node, numbers):
        memory = plan(
            groups_at(model, list(layers.values()), size, gpus),
            stage=zero["stage"],
            itemsize=itemsize,
            state_bytes=ADAM,
            config=zero,
        )
        kept = None
        if activations is not None:
            kept = (activations.kept(size), activations.checkpointed(size))
        plans.append(SizePlan(size, memory, kept))
    return TrainingPlan(model_size(model), tuple(plans), gpu_memory, run)


def _gb(size: float) -> str:
    return f"{size / GIGABYTE:.1f} GB"
