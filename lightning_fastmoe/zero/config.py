"""Checks of the DeepSpeed config, and the choice of its accelerator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lightning_fastmoe.errors import ConfigError

if not torch.cuda.is_available():
    # Keeps DeepSpeed from guessing and warning about it. Must precede its first import.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


STAGES = (1, 2, 3)
"""ZeRO stages that train experts correctly."""


def select_accelerator(device: torch.device) -> None:
    """Makes DeepSpeed use ``device.type``, even on a machine with a faster device."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device.type == "cpu":
        if get_accelerator().device_name() != "cpu":
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())
        # A shared-memory all-reduce for inference that would be compiled on first use (40 s, needs
        # a C++ compiler). Training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    elif device.type == "cuda" and get_accelerator().device_name() != "cuda":
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        set_accelerator(CUDA_Accelerator())  # an earlier Trainer ran on the CPU


_REFUSED_SECTIONS = {
    "optimizer": "create the optimizer in configure_optimizers()",
    "scheduler": "create the scheduler in configure_optimizers()",
    "expert_parallel": "it is DeepSpeed's own expert parallelism; use expert_parallel_size instead",
    "tensor_parallel": "experts can't be combined with tensor parallelism",
    "use_data_before_expert_parallel": "neighbouring ranks form an expert parallel group",
    "sequence_parallel_size": "experts can't be combined with sequence parallelism",
    "zenflow": "experts can't be combined with ZenFlow",
    "data_types": "its gradient accumulation types select optimizers that don't support experts",
    "torch_autocast": "its gradient scaler is not part of checkpoints; use Trainer(precision=...)",
    "amp": "use Trainer(precision=...)",
}
_REQUIRED_ZERO = {"reduce_scatter": True, "contiguous_gradients": True}
_REFUSED_ZERO = {
    "zero_quantized_gradients": False,
    "zero_quantized_weights": False,
    "zero_hpz_partition_size": 1,
    "zenflow": None,
    "round_robin_gradients": False,
}


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Refuses options that would train experts incorrectly, or were never verified.

    Raises:
        ConfigError: naming the option, the rule and the fix.
    """
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping) or "stage" not in zero:
        raise ConfigError(
            "The DeepSpeed config sets no ZeRO stage, and it replaces FastMoEStrategy's own stage."
            " Put 'zero_optimization': {'stage': 2} into it, or use FastMoEStrategy(stage=2)"
            " without a config."
        )
    check_stage(zero["stage"])
    for name, reason in _REFUSED_SECTIONS.items():
        if config.get(name):
            raise ConfigError(f"The DeepSpeed config sets {name!r}, which is refused: {reason}.")
    for name, value in _REQUIRED_ZERO.items():
        if zero.get(name, value) != value:
            raise ConfigError(
                f"{name}={zero[name]} is refused: experts need {name}={value}, as DeepSpeed's other"
                " paths do not reduce their gradients over the right ranks. Drop the option."
            )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise ConfigError(
                f"zero_optimization.{name}.device='nvme' is refused: state on NVMe is not part of"
                " checkpoints. Use device 'cpu'."
            )
    for name, neutral in _REFUSED_ZERO.items():
        if zero.get(name, neutral) != neutral:
            raise ConfigError(
                f"zero_optimization.{name}={zero[name]} is refused: it has not been tested with"
                " experts, whose data parallel groups differ from those of dense parameters. Drop"
                " the option."
            )


def check_stage(stage: Any) -> None:
    """Refuses ZeRO stages that do not exist, or that train experts incorrectly.

    Raises:
        ConfigError: naming the supported stages.
    """
    if stage == 0 and type(stage) is int:
        raise ConfigError(
            "stage=0 is not supported: it must be 1, 2 or 3. DeepSpeed's stage 0 leaves the"
            " experts' gradients out of the clipping norm with a client optimizer (DeepSpeed #8475,"
            " #8613). Stage 1 computes the same with less memory."
        )
    if type(stage) is not int or stage not in STAGES:
        raise ConfigError(
            f"stage={stage!r} is not supported: the ZeRO stage must be the integer 1 (optimizer"
            " states are partitioned), 2 (and gradients) or 3 (and parameters)."
        )


def without_default_leaf_modules(zero: dict[str, Any]) -> None:
    """Makes no module a leaf of ZeRO 3 that the config doesn't name: see zero/leaf_modules.py.

    Args:
        zero: DeepSpeed's ``zero_optimization``, which is changed.
    """
    zero["leaf_module"] = {"classes": [], **(zero.get("leaf_module") or {})}
