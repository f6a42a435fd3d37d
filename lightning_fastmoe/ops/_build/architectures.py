"""Which GPUs a library is compiled for, and which it runs on.

An architecture is written as nvcc's ``code=``: sm_90a is machine code, compute_90 is PTX, which the
driver translates for later GPUs. The rules follow the CUDA programming guide's sections on binary,
PTX and architecture-specific compatibility.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lightning_fastmoe.errors import KernelsUnavailableError

Capability = tuple[int, int]
"""Compute capability of a GPU: (9, 0) is a Hopper."""

NATIVE, PTX, NOTHING = 2, 1, 0
"""How a library supports a GPU: by machine code, by PTX, or not at all."""

_TEGRA = {(5, 3), (6, 2), (7, 2), (8, 7), (11, 0)}
"""Systems on a chip, which don't run machine code built for discrete GPUs of their generation."""


def codes_of_list(text: str, origin: str) -> list[str]:
    """The architectures in a list such as TORCH_CUDA_ARCH_LIST's.

    ``9.0`` means sm_90a: wgmma and TMA multicast exist only there, and all GPUs of compute
    capability 9.0 run it. Other names are taken literally, because sm_100 runs on more GPUs than
    sm_100a does.

    Args:
        text: "8.0;9.0a+PTX", split at semicolons, commas or spaces.
        origin: where the text comes from, for the error.

    Returns:
        ["sm_80", "sm_90a", "compute_90a"] for the text above; each once.

    Raises:
        KernelsUnavailableError: if a name can't be parsed.
    """
    codes = []
    for name in re.split(r"[;,\s]+", text):
        if not name:
            continue
        if (found := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)) is None:
            raise KernelsUnavailableError(f"{origin}={text!r} holds {name!r}; write '8.0;9.0a+PTX'")
        major, minor, suffix, ptx = found.groups()
        number = major + minor + suffix
        codes.append("sm_90a" if number == "90" else f"sm_{number}")
        if ptx:
            codes.append(f"compute_{number}")
    return list(dict.fromkeys(codes))


def codes_of_gpus(capabilities: Iterable[Capability]) -> list[str]:
    """The machine code for exactly these GPUs, with all of their features.

    From 9.0 on that is the ``a`` variant: only it has the tensor core instructions.
    """
    return [
        f"sm_{major}{minor}{'a' if major >= 9 else ''}"
        for major, minor in sorted(set(capabilities))
    ]


def flags_of(codes: Iterable[str]) -> list[str]:
    """nvcc's flags for these architectures."""
    return [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes]


def service(codes: Sequence[str], capability: Capability) -> int:
    """How a library with ``codes`` supports a GPU: NATIVE, PTX or NOTHING."""
    return max((_service_of(code, capability) for code in codes), default=NOTHING)


def least_service(codes: Sequence[str], capabilities: Iterable[Capability]) -> int:
    """How a library with ``codes`` supports the GPU that it supports worst."""
    return min((service(codes, capability) for capability in capabilities), default=NOTHING)


def unserved(codes: Sequence[str], capabilities: Iterable[Capability]) -> str:
    """The first compute capability that ``codes`` don't cover, as "9.0"; "" if they cover all."""
    for capability in capabilities:
        if service(codes, capability) == NOTHING:
            return "{}.{}".format(*capability)
    return ""


def _service_of(code: str, capability: Capability) -> int:
    if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)) is None:
        return NOTHING
    kind, suffix = found[1], found[4]
    made_for = (int(found[2]), int(found[3]))
    same_major = made_for[0] == capability[0] and made_for <= capability
    if suffix == "a":
        serves = made_for == capability
    elif suffix == "f":
        serves = same_major
    elif kind == "compute":
        serves = made_for <= capability
    else:
        # Within a major version, Tegra and other GPUs don't run each other's code.
        serves = made_for == capability or (same_major and not _TEGRA & {made_for, capability})
    if not serves:
        return NOTHING
    return NATIVE if kind == "sm" else PTX
