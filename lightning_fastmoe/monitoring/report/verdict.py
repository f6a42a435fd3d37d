"""Finds starving experts and summarises them in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_fastmoe.monitoring.logs.expert_load import LoadLog, Span, ratios, spans, total

STARVING = 0.25
"""Default load ratio below which an expert starves."""
RECENT = 0.1
"""The fraction at the end of a run's log by which experts are judged."""
FEW_TOKENS = 20
"""Mean count per expert below which ratios are mostly noise."""
_NAMED = 3


@dataclass(frozen=True)
class Starving:
    """An expert that gets few tokens.

    Attributes:
        layer: index of the layer.
        name: the name of the layer.
        expert: global id.
        ratio: load over mean load; 0 is dead.
    """

    layer: int
    name: str
    expert: int
    ratio: float

    @property
    def dead(self) -> bool:
        """Whether it got no token at all."""
        return self.ratio == 0

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


@dataclass(frozen=True)
class Verdict:
    """The verdict on the latest part of a log.

    Attributes:
        state: "starving", "alive", or "unknown" without data.
        sentence: a one-line summary.
        starving: the starving experts, worst first.
        recent: the judged part of the log; None without data.
        num_experts: number of experts over all layers.
        notes: caveats.
    """

    state: Literal["starving", "alive", "unknown"]
    sentence: str
    starving: list[Starving]
    recent: Span | None
    num_experts: int
    notes: list[str]


def judge(log: LoadLog | None, threshold: float = STARVING) -> Verdict:
    """Judges the last tenth of a log, at least its last line.

    Args:
        log: the log; None if there is none.
        threshold: the load ratio below which an expert starves.
    """
    if log is None or not log.records:
        sentence = "Whether experts are starving is unknown: no per-expert loads were logged"
        why = (
            " yet." if log is not None else "; add lightning_fastmoe.ExpertLoadMonitor to the run."
        )
        return Verdict("unknown", sentence + why, [], None, 0, [])
    records = log.records[-max(1, round(RECENT * len(log.records))) :]
    recent = total(spans(records))
    found: list[Starving] = []
    lowest: Starving | None = None
    notes = []
    num_experts = 0
    for index, (layer, counts) in enumerate(zip(log.layers, recent.routed, strict=True)):
        loads = ratios(counts)
        if loads is None:
            notes.append(f"Layer {index} ({layer.name}) saw no token.")
            continue
        assert counts is not None
        num_experts += layer.num_experts
        if sum(counts) < FEW_TOKENS * layer.num_experts:
            notes.append(
                f"Layer {index} routed only {sum(counts)} tokens to {layer.num_experts} experts"
                " in the judged steps, so its loads are noisy."
            )
        for expert, ratio in enumerate(loads):
            candidate = Starving(index, layer.name, expert, ratio)
            if ratio < threshold:
                found.append(candidate)
            if lowest is None or ratio < lowest.ratio:
                lowest = candidate
    if lowest is None:
        return Verdict("unknown", "No layer saw any token.", [], recent, 0, notes)
    found.sort(key=lambda x: (x.ratio, x.layer, x.expert))
    if not found:
        sentence = (
            f"All {num_experts} experts are alive: the smallest load is {lowest.ratio:.2f} of the"
            f" mean ({lowest})."
        )
        return Verdict("alive", sentence, found, recent, num_experts, notes)
    verb = "is" if len(found) == 1 else "are"
    dead = sum(x.dead for x in found)
    also = f" ({dead} dead)" if dead else ""
    named = ", ".join(str(x) for x in found[:_NAMED]) + (", ..." if len(found) > _NAMED else ".")
    sentence = f"{len(found)} of {num_experts} experts {verb} starving{also}: {named}"
    return Verdict("starving", sentence, found, recent, num_experts, notes)
