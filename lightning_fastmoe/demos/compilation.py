"""Whether a model's blocks are compiled: as its user says, and by default on CUDA."""

from __future__ import annotations

from pytorch_lightning import LightningModule


def is_compiled(module: LightningModule, wanted: bool | None) -> bool:
    """Whether to compile the blocks of a model.

    Args:
        module: the model; without a Trainer, its device isn't known.
        wanted: None means yes if a Trainer trains it on a CUDA device.
    """
    if wanted is not None:
        return wanted
    trainer = module._trainer
    return trainer is not None and trainer.strategy.root_device.type == "cuda"
