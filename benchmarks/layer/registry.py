"""All peers by name."""

from __future__ import annotations

from layer.errors import BenchmarkError
from layer.libraries import (
    DeepSpeed,
    Liger,
    SonicMoE,
    SonicMoERouter,
    SonicMoETopK,
    Transformers,
)
from layer.peers import (
    Loop,
    Ours,
    OursGroupedMM,
    OursModule,
    Peer,
    PlainTorch,
    PlainTorchBmm,
    PlainTorchRouter,
)

_CLASSES: tuple[type[Peer], ...] = (
    Ours,
    OursModule,
    OursGroupedMM,
    PlainTorch,
    PlainTorchBmm,
    PlainTorchRouter,
    Loop,
    Transformers,
    Liger,
    SonicMoE,
    SonicMoERouter,
    SonicMoETopK,
    DeepSpeed,
)

PEERS = {peer.name: peer for peer in _CLASSES}
"""Peers by the names that ``--peers`` takes, in the order of the tables."""

DEFAULT = [n for n, peer in PEERS.items() if not peer.compiles and n != "ours-grouped-mm"]
"""Peers of a run that names none: those that compile for minutes, and our own
layer without its products, are left out."""


def parse_peers(text: str) -> list[str]:
    """``"default"``, ``"all"`` or comma-separated names.

    Raises:
        BenchmarkError: for an unknown name.
    """
    if text in ("default", "all"):
        return list(DEFAULT if text == "default" else PEERS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise BenchmarkError(
            f"--peers {text!r}: {', '.join(unknown) or 'nothing'} is not a peer. Take 'default',"
            f" 'all' or some of: {', '.join(PEERS)}."
        )
    return names
