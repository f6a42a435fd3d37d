"""What Lightning's checkpoint hooks see of the weights, and a check that they didn't edit them.

Each rank writes and reads the weights that it owns, outside of the dictionary that Lightning passes
to hooks. For hooks that look at names and shapes, ``checkpoint["state_dict"]`` lists all weights as
meta tensors, without values. Edits would have no effect, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.tensor_names import repeats_rows, split_name
from lightning_fastmoe.checkpoint.model_map import ModelMap
from lightning_fastmoe.checkpoint.sources.base import Source
from lightning_fastmoe.errors import CheckpointError

_SHOWN = 3
_MEND = {
    "on_save_checkpoint": (
        "each rank writes the weights that it owns after the hook. Store what you need under"
        " another key or in a persistent buffer, leave frozen parameters out with"
        " FastMoEStrategy(exclude_frozen_parameters=True), or edit the file that"
        " `lightning-fastmoe checkpoint consolidate` writes"
    ),
    "on_load_checkpoint": (
        "each rank has read the weights that it owns before the hook. Edit the file that"
        " `lightning-fastmoe checkpoint consolidate` writes and load that, or set"
        " strict_loading=False to load what matches"
    ),
}


class WeightNames:
    """The names and shapes that a hook must leave unchanged.

    Args:
        shapes: name -> (shape, dtype).
        tied: alias -> first name of a tied parameter.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        tied: Mapping[str, str],
    ) -> None:
        with torch.inference_mode(False):  # inference tensors don't count writes
            tensors = {
                name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (shape, dtype) in shapes.items()
            }
        tensors |= {name: tensors[first] for name, first in tied.items() if first in tensors}
        self._tensors = tensors

    @classmethod
    def of_model(cls, model: ModelMap) -> WeightNames:
        """The weights of a model that will be saved, as far as this rank knows their names."""
        parameters = [(n, *one) for n, one in model.parameters.items() if not repeats_rows(n)]
        shapes = {name: (f.shape, p.dtype) for name, p, f in parameters}
        shapes |= {name: (tuple(b.shape), b.dtype) for name, b in model.buffers.items()}
        return cls(shapes, model.tied)

    @classmethod
    def of_source(cls, source: Source) -> WeightNames:
        """The weights in a checkpoint."""
        weights = ((split_name(tensor), record) for tensor, record in source.tensors.items())
        shapes = {
            name: (r.shape, DTYPES[r.dtype])
            for (kind, name), r in weights
            if kind is None and not repeats_rows(name)
        }
        return cls(shapes, source.tied)

    def state_dict(self) -> dict[str, Tensor]:
        """The entry for Lightning's checkpoint dictionary."""
        return dict(self._tensors)

    def check(
        self, checkpoint: Mapping[str, Any], optimizers: int, hook: str, trainer: pl.Trainer
    ) -> None:
        """Refuses changes that hooks made.

        Args:
            checkpoint: the dictionary after the hooks.
            optimizers: number of (empty) optimizer states in the dictionary before the hooks.
            hook: name of the hook.
            trainer: the Trainer that called the hooks.

        Raises:
            CheckpointError: naming the hook and what it changed.
        """
        change = self._change(checkpoint.get("state_dict"))
        # Without the key only weights are saved, which is allowed.
        if change is None and checkpoint.get("optimizer_states", [{}] * optimizers) != (
            [{}] * optimizers
        ):
            change = "checkpoint['optimizer_states'] was changed"
        if change is not None:
            raise CheckpointError(
                f"{_hooks(hook, trainer)}: {change}, which has no effect under FastMoEStrategy:"
                f" {_MEND[hook]}."
            )

    def _change(self, state: Any) -> str | None:
        if not isinstance(state, Mapping):
            return "checkpoint['state_dict'] was removed"
        removed = [name for name in self._tensors if name not in state]
        added = [name for name in state if name not in self._tensors]
        other = [
            name
            for name, tensor in self._tensors.items()
            if name in state and (state[name] is not tensor or tensor._version)
        ]
        for names, what in ((removed, "was removed"), (added, "was added"), (other, "was changed")):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                listed = ", ".join(map(repr, names[:_SHOWN]))
                return f"{listed}{more} in checkpoint['state_dict'] {what}"
        return None


def _hooks(hook: str, trainer: pl.Trainer) -> str:
    owners: list[str] = [
        type(callback).__name__
        for callback in _callbacks(trainer)
        if is_overridden(hook, callback, pl.Callback)
    ]
    if is_overridden(hook, trainer.lightning_module, pl.LightningModule):
        owners.append(type(trainer.lightning_module).__name__)
    return " or ".join(f"{owner}.{hook}" for owner in owners) or hook


def _callbacks(trainer: pl.Trainer) -> Iterable[pl.Callback]:
    callbacks: Any = vars(trainer)["callbacks"]  # set by a connector, which mypy does not see
    return list(callbacks)
