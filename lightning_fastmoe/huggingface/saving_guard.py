"""Keeping transformers from saving a model by names that no loader would know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_fastmoe.huggingface.sharded_experts import kind

_SAVING = ("save_pretrained", "push_to_hub")


def guard_saving(model: nn.Module, refuse: Callable[..., Any]) -> None:
    """Makes transformers' models refuse to be saved: names in their files would have no meaning.

    PEFT's models keep their method, which writes PEFT's own adapters only.
    """
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(True for _ in kind.layers(part)):
            for name in _SAVING:
                vars(part)[name] = refuse


def unguard_saving(model: nn.Module, refuse: Callable[..., Any]) -> None:
    """Undoes :func:`guard_saving` with the same function."""
    for part in model.modules():
        for name in _SAVING:
            if vars(part).get(name) is refuse:
                del vars(part)[name]
