"""Averaged weights kept alongside the training weights, for saving and loading.

A checkpoint of a run that averages its weights stores the averages as its weights, and the training
weights as one more optimizer state. Resuming reads the training weights from there; every other
reader of the checkpoint gets the averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.tensor_names import OPTIMIZER, state_name
from lightning_fastmoe.zero.state import ZeroShard

TRAINING = "training_weights"
"""Name of the optimizer state that holds the training weights."""


def training_name(name: str) -> str:
    """The tensor that holds the training weights of a parameter or buffer."""
    return state_name(TRAINING, name)


def has_training_weights(tensors: Mapping[str, object]) -> bool:
    """Whether a checkpoint's weights are averages."""
    return any(tensor.startswith(f"{OPTIMIZER}/{TRAINING}/") for tensor in tensors)


@dataclass(frozen=True)
class Averages:
    """This rank's shard of the averages.

    Attributes:
        masters: one per partition, laid out like its master.
        loose: parameter that no partition holds -> this rank's part of its average, flat.
        buffers: persistent buffer -> its average.
        swapped: whether the module currently holds the averages, and these tensors the training
            weights.
    """

    masters: list[Tensor]
    loose: dict[str, Tensor]
    buffers: dict[str, Tensor]
    swapped: bool = False

    def beside(self, shard: ZeroShard) -> ZeroShard:
        """A shard of the same layout that holds these tensors."""
        return ZeroShard(
            [replace(f, master=m) for f, m in zip(shard.flats, self.masters, strict=True)],
            [replace(one, data=self.loose[one.name], origin=None) for one in shard.loose],
        )

    @torch.no_grad()
    def take(self, shard: ZeroShard, buffers: Mapping[str, Tensor]) -> None:
        """Copies the module's weights."""
        for flat, master in zip(shard.flats, self.masters, strict=True):
            master.copy_(flat.master)
        for one in shard.loose:
            self.loose[one.name].copy_(one.data)
        for name, buffer in buffers.items():
            self.buffers[name].copy_(buffer)
