"""What passes with experts in host memory took, beside what their plan predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lightning_fastmoe.planning.offload import OffloadCosts, OffloadPlan
from lightning_fastmoe.planning.offload_sizes import GIGABYTE, OffloadSizes


@dataclass(frozen=True)
class PassTimes:
    """What one pass took on the device.

    Attributes:
        tokens: that reached a layer with experts.
        between: seconds from the end of the pass before, in which batches are loaded; 0 for the
            first.
        computing: seconds without those of ``waiting``.
        waiting: seconds in which the device waited for experts to be copied.
    """

    tokens: int
    between: float
    computing: float
    waiting: float

    @property
    def seconds(self) -> float:
        """From the end of the pass before to the end of this one."""
        return self.between + self.computing + self.waiting


@dataclass(frozen=True)
class CopyTimes:
    """What copies took.

    Attributes:
        bytes: that were copied.
        seconds: in which the link was copying.
    """

    bytes: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second; infinite if there was nothing to measure."""
        return self.bytes / self.seconds if self.seconds else float("inf")

    def __add__(self, other: CopyTimes) -> CopyTimes:
        return CopyTimes(self.bytes + other.bytes, self.seconds + other.seconds)


@dataclass(frozen=True)
class OffloadReport:
    """Passes, and the plan of those that took most of the time.

    Attributes:
        passes: all of them.
        comparable: those of ``plan.tokens`` tokens, without the first of all if there are others,
            since it builds kernels and finds no experts copied ahead.
        plan: what is planned for one of those, with the costs seen: the rate of the copies, what
            computation and the time between passes took, and the peak of the memory.
        peak: bytes of GPU memory at most; 0 if unknown.
    """

    passes: tuple[PassTimes, ...]
    comparable: tuple[PassTimes, ...]
    plan: OffloadPlan
    peak: int

    @property
    def seconds(self) -> float:
        """The median of comparable passes."""
        return median(one.seconds for one in self.comparable)

    @property
    def waiting(self) -> float:
        """Seconds that one of them waited for copies, the median."""
        return median(one.waiting for one in self.comparable)

    @property
    def limit(self) -> str:
        """What the passes waited for."""
        costs = self.plan.costs
        if self.plan.limit == "the GPU" and costs.rest > costs.layers:
            return "what comes between passes, such as loading batches"
        return self.plan.limit

    def text(self) -> str:
        """Two lines: what was measured, and what is planned."""
        plan, tokens = self.plan, self.plan.tokens
        total = sum(one.seconds for one in self.passes)
        rate = plan.costs.link / GIGABYTE
        copies = f"copies {_s(plan.copying)} at {rate:.1f} GB/s" if plan.copied else "no copies"
        size, speed = "", ""
        if tokens:  # else not counted, as torch.compile may leave observers out
            size = f"those of {tokens:,} tokens "
            speed = f" ({tokens / max(self.seconds, 1e-9):,.0f} tokens/s)"
        return (
            f"{len(self.passes)} passes took {_s(total)}: {size}{_s(self.seconds)} each{speed}, of"
            f" which {_s(self.waiting)} for copies; they waited for {self.limit}.\n"
            f"With the costs seen, {_s(plan.seconds)} are planned: {copies}, computation"
            f" {_s(plan.costs.layers)}, between passes {_s(plan.costs.rest)}"
            + (f"; {self.peak / GIGABYTE:.1f} GB of GPU memory at most." if self.peak else ".")
        )


def observed(
    passes: Sequence[PassTimes],
    copies: CopyTimes,
    sizes: OffloadSizes,
    *,
    slots: int,
    resident: int,
    groups: int = 1,
    expert_cache: int = 0,
    gpu_memory: int = 0,
    peak: int = 0,
) -> OffloadReport | None:
    """What passes took, and the plan for those sizes of pass that took most of the time.

    Args:
        passes: in their order.
        copies: of all of them.
        sizes: of the model.
        slots: layers whose experts have room on the GPU at a time.
        resident: layers whose experts stay there.
        groups: of a layer's experts, of which a slot holds one.
        expert_cache: bytes for experts that were used last.
        gpu_memory: bytes that may be used.
        peak: bytes that were used at most; 0 if unknown.

    Returns:
        The report; None without passes.
    """
    if not passes:
        return None
    totals: dict[int, float] = {}
    for one in passes:
        totals[one.tokens] = totals.get(one.tokens, 0.0) + one.seconds
    tokens = max(totals, key=lambda size: totals[size])
    later = [one for one in passes[1:] if one.tokens == tokens]
    comparable = later or [passes[0]]
    costs = OffloadCosts(
        copies.rate,
        layers=median(one.computing for one in comparable),
        rest=median(one.between for one in comparable),
        activations=max(0, peak - sizes.weights_on_gpu(slots, resident, groups) - expert_cache),
        decompression=math.inf,  # which is part of the computation seen
        is_measured=True,
    )
    plan = OffloadPlan(
        sizes,
        costs,
        tokens,
        0,
        gpu_memory,
        slots,
        resident,
        groups=groups,
        expert_cache=expert_cache,
    )
    return OffloadReport(tuple(passes), tuple(comparable), plan, peak)


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s"
