"""Which part of a step a kernel belongs to, by its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

PARTS = (
    ("optimizer", r"[Aa]dam|multi_tensor|foreach|LpNorm"),
    (
        "expert layers",
        r"lightning_fastmoe|fastmoe|grouped_mm|GroupProblem|grouped_gemm"
        r"|_moe_|_fused_up_proj|_fused_down_proj|_token_gather|quack|sonicmoe",
    ),
    ("attention", r"flash|fmha|cudnn.*sdpa|sdpa|attention"),
    ("communication", r"nccl"),
    ("GEMMs", r"gemm|nvjet|cutlass|xmma|splitK|cublas"),
    ("copies and fills", r"[Mm]emcpy|[Mm]emset|copy_kernel|FillFunctor|direct_copy|CatArray"),
    ("elementwise and reductions", r"."),
)


def part_of(name: str) -> str:
    """The first part whose pattern the name contains."""
    return next(part for part, pattern in PARTS if re.search(pattern, name))


def split(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds of each part, and of none.

    Args:
        kernels: (name, start, end) in microseconds, in any order.

    Returns:
        Part -> milliseconds; a kernel that runs beside others counts in full. "idle": the time
        between the first start and the last end in which none ran.
    """
    parts: dict[str, float] = defaultdict(float)
    found = sorted(kernels, key=lambda kernel: kernel[1])
    if not found:
        return {}
    idle, until = 0.0, found[0][1]
    for name, start, end in found:
        parts[part_of(name)] += (end - start) / 1000
        idle += max(0.0, start - until) / 1000
        until = max(until, end)
    return {**{part: round(ms, 3) for part, ms in sorted(parts.items())}, "idle": round(idle, 3)}


def longest(kernels: Iterable[tuple[str, float, float]], count: int = 45) -> list[str]:
    """Lines "milliseconds, launches, name" of those that took longest in all."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, start, end in kernels:
        times[name].append((end - start) / 1000)
    first = sorted(times.items(), key=lambda item: -sum(item[1]))[:count]
    return [f"{sum(ms):9.3f} {len(ms):5d}  {name[:150]}" for name, ms in first]


def gaps(kernels: Iterable[tuple[str, float, float]], count: int = 15) -> list[str]:
    """Lines "idle milliseconds, at, before this kernel" of the longest gaps, in their order."""
    found = sorted(kernels, key=lambda kernel: kernel[1])
    if not found:
        return []
    first = until = found[0][1]
    idle: list[tuple[float, float, str]] = []
    for name, start, end in found:
        if start > until:
            idle.append(((start - until) / 1000, (until - first) / 1000, name))
        until = max(until, end)
    longest = sorted(idle, reverse=True)[:count]
    return [
        f"{ms:9.3f} idle at {at:7.2f}, before {name[:100]}"
        for ms, at, name in sorted(longest, key=lambda gap: gap[1])
    ]
