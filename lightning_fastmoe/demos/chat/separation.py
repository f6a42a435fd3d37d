"""Finds out whether a model keeps texts apart that share a row."""

from __future__ import annotations

from typing import Any

import torch

from lightning_fastmoe.errors import ConfigError

_FIRST, _OTHER = (0, 1, 2, 3), (7, 6, 5, 4)
_SECOND, _CHANGED = (1, 3, 5, 7), (6, 3, 5, 7)
_SMALL = 0.01
"""A text's influence, relative to that of an earlier token, below which it is a rounding error.

What doesn't see the other text is computed from the same numbers, so that it is mostly zero."""


@torch.no_grad()
def check_separation(model: Any) -> None:
    """Refuses a model whose attention goes across texts that only ``position_ids`` keep apart.

    Most models of transformers build their masks so that it doesn't; gpt-oss, for one, ignores
    them (5.17). Two texts share a row. Another first text must not change the last logits of the
    second one; another beginning of the second one must.

    Args:
        model: a causal language model of transformers. Where experts are sharded, every rank calls
            this, for example in ``on_train_start``.

    Raises:
        ConfigError: if the second of two texts sees the first one.
    """
    device = next(model.parameters()).device
    rows = [_FIRST + _SECOND, _OTHER + _SECOND, _FIRST + _CHANGED]
    places = torch.arange(len(_FIRST), device=device)
    was_training = model.training
    model.eval()
    try:
        logits = model(
            input_ids=torch.tensor(rows, device=device),
            position_ids=torch.cat([places, places]).expand(len(rows), -1),
            use_cache=False,
        ).logits
    finally:
        model.train(was_training)
    row, of_other, of_changed = logits[:, -1].float()
    leak, influence = (float((row - one).norm()) for one in (of_other, of_changed))
    if not leak <= _SMALL * influence:
        raise ConfigError(
            f"{type(model).__name__} doesn't keep texts apart that share a row: each would see"
            " those before it. Don't pack them: ChatFiles(..., packed=False)."
        )
