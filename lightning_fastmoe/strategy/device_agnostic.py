"""Lightning's DeepSpeedStrategy for CUDA and the CPU, with Lightning deciding when to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.zero.collectives import modernise_collectives
from lightning_fastmoe.zero.config import (
    check_deepspeed_config,
    select_accelerator,
    without_default_leaf_modules,
)
from lightning_fastmoe.zero.groups import forget_destroyed_groups

BUCKET = 25_000_000
"""Elements up to which ZeRO 1 and 2 reduce gradients together, unless the user says otherwise.
Larger gradients, such as those of most layers' experts, are reduced one by one."""


class DeviceAgnosticDeepSpeedStrategy(DeepSpeedStrategy):
    """The base of FastMoEStrategy: everything that is unrelated to experts.

    Args:
        kwargs: as for :class:`pytorch_lightning.strategies.DeepSpeedStrategy`.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("stage") in (1, 2):
            kwargs.setdefault("reduce_bucket_size", BUCKET)
        super().__init__(**kwargs)
        assert isinstance(self.config, dict)
        # DeepSpeed demands its own CPU Adam for offloading unless told that any optimizer will do.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        # Else DeepSpeed waits for the device at both ends of each batch, to time it.
        self.config.setdefault("timers", {"throughput": {"synchronized": False}})
        check_deepspeed_config(self.config)

    @override
    def _init_config_if_needed(self) -> None:
        super()._init_config_if_needed()
        assert isinstance(self.config, dict)
        check_deepspeed_config(self.config)  # again: the user may have changed it
        without_default_leaf_modules(self.config["zero_optimization"])

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator | CPUAccelerator):
            raise ConfigError(
                f"accelerator={type(self.accelerator).__name__} is not supported: FastMoEStrategy"
                " runs on 'cuda' (NCCL) and 'cpu' (gloo)."
            )
        # Skips DeepSpeedStrategy's own method, which refuses the CPU.
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        select_accelerator(self.root_device)
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        # As the base class, without its check of CUDA device indices.
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        assert isinstance(self.config, dict)
        self.config["zero_optimization"]["overlap_comm"] = False  # the CPU has no streams

    @override
    def _init_deepspeed_distributed(self) -> None:
        forget_destroyed_groups()
        super()._init_deepspeed_distributed()
        modernise_collectives()

    @override
    def _auto_select_batch_size(self) -> int:
        # DeepSpeed uses it only for its throughput log. To find it, the base class builds the
        # user's data loader a second time, and fails on loaders without a batch sampler.
        return 1

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        # Lightning decides when to step, and tells the engine. Left to count by itself, DeepSpeed
        # drifts out of step with Lightning when an epoch is not a multiple of the accumulation.
        return False

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to block: the engine reduces as its stage needs, and steps when told."""
        yield

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces as the base class does, but doesn't round the mean of integers down.

        ``self.log(..., sync_dist=True)`` divides by the mean number of samples per rank.
        """
        integers = isinstance(tensor, Tensor) and not tensor.is_floating_point()
        if integers and reduce_op in ("mean", "avg"):
            tensor = tensor.double()
        return super().reduce(tensor, group, reduce_op)
