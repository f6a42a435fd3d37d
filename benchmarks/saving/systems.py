"""What saves and loads the state of one engine, each in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard


def partitions(engine: Any) -> dict[str, Tensor]:
    """This rank's part of weights and optimizer states."""
    zero = engine.optimizer
    result = {}
    for i, master in enumerate(zero.single_partition_of_fp32_groups):
        result[f"{i}.weights"] = master.detach()
        for name, value in zero.optimizer.state[master].items():
            if value.dim():
                result[f"{i}.{name}"] = value
    return result


class System(ABC):
    """Something that saves a state to a directory and loads it from there."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.engine = trainer, trainer.strategy.deepspeed_engine

    @abstractmethod
    def save(self, path: Path) -> None:
        """Into an empty directory; every rank calls this, as :meth:`load`."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """What :meth:`save` wrote there."""


class FastMoE(System):
    def save(self, path: Path) -> None:
        self.trainer.save_checkpoint(str(path / "a.ckpt"))

    def load(self, path: Path) -> None:
        self.trainer.strategy.load_checkpoint(str(path / "a.ckpt"))


class DeepSpeed(System):
    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(str(path), tag="a")

    def load(self, path: Path) -> None:
        # The engine's own checks for Lightning's directories are not part of what is measured.
        loaded, _ = self.engine.load_checkpoint(str(path), tag="a")
        if loaded is None:
            raise RuntimeError("DeepSpeed found no checkpoint")


class DCP(System):
    def state(self) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {
            n: DTensor.from_local(t, mesh, [Shard(0)]) for n, t in partitions(self.engine).items()
        }

    def save(self, path: Path) -> None:
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        dcp.load(self.state(), checkpoint_id=path)


class Torch(System):
    def file(self, path: Path) -> Path:
        return path / f"{dist.get_rank()}.pt"

    def save(self, path: Path) -> None:
        torch.save(partitions(self.engine), self.file(path))

    def load(self, path: Path) -> None:
        loaded = torch.load(self.file(path), weights_only=True)
        for name, target in partitions(self.engine).items():
            target.copy_(loaded[name])


KINDS = {"fastmoe": FastMoE, "deepspeed": DeepSpeed, "dcp": DCP, "torch": Torch}
