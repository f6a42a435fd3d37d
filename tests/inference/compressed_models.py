"""Models whose experts have been rounded by the slow twin of what compresses them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.ops import reference
from lightning_fastmoe.ops.group_quantization import BITS, GROUP, SCALE_DTYPES

ROUNDED = "weights are what int. has left of them"
"""In the warning of a model that was compressed."""


def rounded(model: nn.Module, compression: str, resident: int = 0) -> nn.Module:
    """A copy whose experts' matrices have been rounded by the slow twin."""
    model = copy.deepcopy(model)
    layers = list(expert_layers(model))
    for _, layer in layers[: len(layers) - resident]:
        for name, parameter in layer.experts.holder.named_parameters():
            if "bias" not in name:
                stored = SCALE_DTYPES[parameter.dtype]
                values, steps = reference.quantize_groups(
                    parameter.data, BITS[compression], GROUP, stored
                )
                wide = torch.promote_types(stored, torch.float32)
                parameter.data = (values.to(wide) * steps.to(wide)).to(parameter.dtype)
    return model
