"""Reports what Lightning's model summary leaves out: the experts of other ranks."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelSummary
from pytorch_lightning.utilities import rank_zero_info

from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.planning.sizes import numel


def correct_summary(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Prints how many parameters Lightning's summary, just printed, did not count.

    A model built in ``configure_model`` holds this rank's experts only when Lightning counts them,
    and its "Total params" would be mistaken for the whole model's.

    Args:
        trainer: the Trainer; its callbacks show whether a summary was printed.
        module: the module, with its MoE layers unchanged since then.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    summaries = [c for c in callbacks if isinstance(c, ModelSummary) and c._max_depth != 0]
    divided = {name: layer for name, layer in expert_layers(module) if layer.is_sharded}
    if not (trainer.training and summaries and divided):
        return
    name, first = next(iter(divided.items()))
    text = (
        "The summary above counts the experts of one rank only, such as"
        f" {first.num_local_experts} of {first.num_experts} in {name}."
    )
    if all(layer.experts.is_stacked for layer in divided.values()):
        text += f" The other ranks hold {sum(map(_elsewhere, divided.values())):,} more parameters."
    rank_zero_info(f"{text} Add the callback MoESummary for the whole model's numbers.")


def _elsewhere(layer: ExpertLayer) -> int:
    """Parameters of the experts that this rank does not hold; stacked experts have equal sizes."""
    here = sum(map(numel, layer.experts.whole_parameters()))
    return here // layer.num_local_experts * (layer.num_experts - layer.num_local_experts)
