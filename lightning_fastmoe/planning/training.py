"""Plans a training run of FastMoEStrategy: bytes of a rank by expert parallel size, and what fits.

Weights, gradients and optimizer are those of :mod:`~lightning_fastmoe.planning.memory`, what the
exchange of tokens takes is that of :mod:`~lightning_fastmoe.planning.exchange`; activations are
counted elsewhere, by the shapes of a model. Routing is taken to be balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_fastmoe.distributed import expert_parallel_sizes
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.planning.exchange import ExchangePlan, layer_shapes
from lightning_fastmoe.planning.memory import MemoryPlan, plan
from lightning_fastmoe.planning.parallel_size import ADAM, groups_at
from lightning_fastmoe.planning.sizes import ModelSize, model_size
from lightning_fastmoe.planning.units import bytes_text as _gb
from lightning_fastmoe.planning.units import count_text


@dataclass(frozen=True)
class Activations:
    """Bytes that a rank keeps between a micro-batch's forward and backward pass.

    Attributes:
        layers: of each layer of the model, all experts on one rank.
        outside: of what is outside of layers, but for logits.
        logits: at the peak of the loss.
        hidden: of one hidden state of all tokens, which is what checkpointing keeps of a layer.
    """

    layers: tuple[int, ...]
    outside: int
    logits: int
    hidden: int

    def kept(self, exchange: ExchangePlan) -> int:
        """The peak without checkpointing: at the loss, or in the last layer's backward pass."""
        layers = sum(self.layers) + sum(exchange.kept)
        return layers + self.outside + max(self.logits, exchange.working)

    def checkpointed(self, exchange: ExchangePlan) -> int:
        """The peak with each layer checkpointed: inputs of all, and the largest computed again."""
        again = max(self.layers, default=0) + max(exchange.kept, default=0) + exchange.working
        return len(self.layers) * self.hidden + self.outside + max(again, self.logits)


@dataclass(frozen=True)
class SizePlan:
    """One expert parallel size.

    Attributes:
        size: the expert parallel size.
        memory: weights, gradients, optimizer and buffers.
        exchange: of tokens between ranks.
        activations: bytes without and with checkpointing, with what the exchange keeps of each
            layer; None if they are unknown.
    """

    size: int
    memory: MemoryPlan
    exchange: ExchangePlan
    activations: tuple[int, int] | None

    def needed(self, *, checkpointed: bool) -> int:
        """Bytes on the device; without activations where these are unknown."""
        held = self.memory.total.device + self.exchange.buffers
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
            f"{self.run}; {count_text(self.model.total)} parameters, {count_text(experts)} of them"
            " in experts",
            "expert parallel   weights  gradients  optimizer   buffers  exchange  activations"
            "      sum  checkpointed      sum",
        ]
        for one in self.sizes:
            held = one.memory.total
            state = (held.weights, held.gradients, held.optimizer, held.buffers)
            parts = (*state, one.exchange.buffers)
            cells = [
                f"{one.size:>15}",
                *(
                    _gb(part).rjust(width)
                    for part, width in zip(parts, (10, 11, 11, 10, 10), strict=True)
                ),
            ]
            for checkpointed, width in ((False, 13), (True, 14)):
                kept = _gb(one.activations[checkpointed]) if one.activations else "unknown"
                cells += [kept.rjust(width), _gb(one.needed(checkpointed=checkpointed)).rjust(9)]
            lines.append("".join(cells))
        lines += self._exchange_lines()
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

    def _exchange_lines(self) -> list[str]:
        """How tokens are exchanged, and what layers keep of it."""
        found = [one for one in self.sizes if one.exchange.ways and one.size > 1]
        lines = []
        for name in dict.fromkeys(one.exchange.ways for one in found):
            kept = [
                f"{_gb(sum(one.exchange.kept))} at {one.size}"
                for one in found
                if one.exchange.ways == name
            ]
            lines.append(
                f"tokens are exchanged by dispatcher {name}, which adds to the activations"
                f" {', '.join(kept)}"
            )
        return lines


def training_plan(
    model: nn.Module,
    activations: Activations | None,
    *,
    gpus: int,
    gpus_per_node: int,
    gpu_memory: int,
    tokens: int,
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
        tokens: of a rank's micro-batch.
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
    shapes = layer_shapes(layers.values(), tokens, itemsize)
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
        exchange = ExchangePlan(shapes, size)
        kept = None
        if activations is not None:
            kept = (activations.kept(exchange), activations.checkpointed(exchange))
        plans.append(SizePlan(size, memory, exchange, kept))
    return TrainingPlan(model_size(model), tuple(plans), gpu_memory, run)
