"""Checks options of offloading, each and together."""

from __future__ import annotations

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.ops.group_quantization import bits_of


def check_slots(layers: int, slots: int, resident_layers: int) -> None:
    """Checks both numbers against a model's number of layers with experts.

    Raises:
        ConfigError: if one is out of range.
    """
    if slots < 1 or not 0 <= resident_layers <= layers:
        raise ConfigError(
            f"slots={slots} must be at least 1, and resident_layers={resident_layers} between 0"
            f" and the model's {layers} layers."
        )


def check_groups(groups: int, num_experts: int) -> None:
    """Checks the number of groups against a layer's number of experts.

    Raises:
        ConfigError: if it is out of range.
    """
    if not 1 <= groups <= num_experts:
        raise ConfigError(
            f"groups={groups} must be between 1 and the {num_experts} experts of a layer."
        )


def check_together(
    compression: str | None = None,
    expert_cache: str | int | None = None,
    groups: int = 1,
    chunk_sequences: int | str | None = None,
) -> None:
    """Checks options that don't depend on the model.

    Raises:
        ConfigError: if there is no such compression, or two options exclude each other.
    """
    if groups != 1 and chunk_sequences is not None:
        raise ConfigError(
            f"groups={groups} keeps a part of a layer's experts on the GPU at a time, so"
            f" chunk_sequences={chunk_sequences} would copy all of them for each chunk: leave one"
            " of both out."
        )
    if compression is None:
        return
    bits_of(compression)
    reason = "decompresses whole layers, into memory for one"
    if expert_cache is not None:
        raise ConfigError(
            f"compression={compression!r} {reason}, and expert_cache={expert_cache!r} keeps single"
            " experts: leave one of both out."
        )
    if groups != 1:
        raise ConfigError(
            f"compression={compression!r} {reason}, and groups={groups} divides them: leave one of"
            " both out."
        )


def check_several_gpus(compression: str | None = None, groups: int = 1) -> None:
    """Refuses what several processes that share experts can't do.

    Raises:
        ConfigError: naming the option.
    """
    if compression is not None:
        raise ConfigError(
            f"compression={compression!r} is not supported on several GPUs, which share the experts"
            " in host memory as they are: leave it out, or use OffloadStrategy on one GPU."
        )
    if groups != 1:
        raise ConfigError(
            f"groups={groups} is not supported on several GPUs, which exchange whole layers: leave"
            " it out, or use OffloadStrategy on one GPU."
        )
