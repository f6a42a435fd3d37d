"""What the ranks run in test_qlora.py: training adapters of experts in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface.lora_runs import Adapted, adapt
from huggingface.sharding_runs import EpochPerStep, Run, WeightsByEpoch, make_model
from strategy.tracing import make_trainer
from torch import Tensor

from lightning_fastmoe.huggingface import (
    choose_dispatcher,
    dequantize_experts,
    from_pretrained,
    quantize_experts,
    save_adapters,
)
from lightning_fastmoe.nn.expert_layers import expert_layers

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
        if run.ep > 1:  # it computes with the experts' stacks itself if it can
            choose_dispatcher(self.net, "symmetric")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of all parameters, integers too, as users write it."""
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)


class PackedFromFiles(Adapted):
    """Fine-tunes nothing but adapters of experts that each rank reads and quantises for itself."""

    def __init__(self, run: Run, folder: Path) -> None:
        EpochPerStep.__init__(self, run)
        self.folder, self.net = folder, None

    def configure_model(self) -> None:
        if self.net is None:
            model = from_pretrained(self.folder, quantize_experts=SCHEME)
            sizes = {layer.num_local_experts for _, layer in expert_layers(model)}
            assert sizes == {8 // self.run.ep}
            self.net = adapt(model)
            self._draw_own()
            self.net.lm_head.weight.requires_grad_(False)

    @torch.no_grad()
    def _draw_own(self) -> None:
        """B as :func:`adapt` draws it for all experts."""
        torch.manual_seed(12)
        for layer in (layer for _, layer in expert_layers(self.net)):
            for name, parameter in layer.experts.named_parameters():
                if name.endswith("_lora_b"):
                    whole = torch.empty(layer.num_experts, *parameter.shape[1:]).normal_(std=0.1)
                    parameter.copy_(whole[list(layer.experts.local_ids)])


def fits_from_files(
    run: Run, base: Path, folder: Path, resume_from: Path | None = None
) -> list[dict[str, Tensor]]:
    """Trains two steps more, saves the adapters both ways, and returns the weights."""
    module, weights = PackedFromFiles(run, base), WeightsByEpoch()
    trainer = make_trainer(
        run,
        callbacks=[weights],
        max_steps=-1,
        max_epochs=2 if resume_from is None else 4,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, ckpt_path=resume_from)
    trainer.save_checkpoint(folder / "last.ckpt")
    save_adapters(trainer, folder / "adapters")
    return weights.weights
