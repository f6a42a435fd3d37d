"""What modules' ``get_extra_state()`` returned, in checkpoints and back in a module.

Tensors are stored with the weights, everything else beside Lightning's own dictionary. Other
entries of a state dict, such as those that hooks add, are handled the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.tensor_names import weight_name
from lightning_fastmoe.checkpoint.model_map import ModelMap
from lightning_fastmoe.checkpoint.sources.base import Source
from lightning_fastmoe.errors import CheckpointError


def load_extra_states(
    source: Source, model: ModelMap, stored: Mapping[str, Any], *, strict: bool
) -> None:
    """Gives the modules of a model their extra states.

    Args:
        source: holds those that are tensors.
        model: the model.
        stored: the others, by name.
        strict: each must have a module.

    Raises:
        CheckpointError: naming the first that has none.
    """
    extra = dict(stored)
    for name, value in model.extra().items():
        record = source.tensors.get(weight_name(name))
        if isinstance(value, Tensor) and record is not None:
            values = torch.empty(record.shape, dtype=DTYPES[record.dtype])
            source.read_into(weight_name(name), 0, values.view(-1))
            extra[name] = values.to(value.device)
    if extra:
        unknown = model.module.load_state_dict(extra, strict=False).unexpected_keys
        if unknown and strict:
            raise unknown_state(source.path, unknown[0])


def unknown_state(path: Path, name: str) -> CheckpointError:
    """The error for an extra state of a module that the model doesn't have."""
    return CheckpointError(
        f"{path} holds extra state of {name!r}, which the model does not have. Set"
        " strict_loading=False on the LightningModule to leave it out."
    )
