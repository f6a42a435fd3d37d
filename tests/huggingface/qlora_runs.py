"""What the ranks run in test_qlora.py: training adapters of experts in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface.lora_runs import Adapted, adapt
from huggingface.sharding_runs import EpochPerStep, Run, make_model

from lightning_fastmoe.huggingface import dequantize_experts, from_pretrained, quantize_experts

SCHEME = "nf4-double"


def packed(run: Run) -> Any:
    """The model with adapters and a base in 4 bits."""
    model = make_model(run)
    quantize_experts(model, SCHEME)
    return adapt(model)


def unpacked(run: Run) -> Any:
    """The same model, with the values of the base as ordinary weights."""
    model = make_model(run)
    quantize_experts(model, SCHEME)
    dequantize_experts(model)
    return adapt(model)


class Packed(Adapted):
    """Fine-tunes the adapters of a model that every rank quantises whole."""

    def __init__(self, run: Run) -> None:
        EpochPerStep.__init__(self, run)
        self.net = packed(run)


class PackedFromFiles(Adapted):
    """Fine-tunes the adapters of experts that each rank reads and quantises for itself."""

    def __init__(self, run: Run, folder: Path) -> None:
        EpochPerStep.__init__(self, run)
        self.folder, self.net = folder, None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = adapt(from_pretrained(self.folder, quantize_experts=SCHEME))
