"""Freezing a model but for what is asked for, and keeping transformers from saving it wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.sharded_experts import kind

_SAVING = ("save_pretrained", "push_to_hub")


def freeze(model: nn.Module, also_train: Iterable[str], what: str) -> None:
    """Freezes what neither PEFT trains nor ``also_train`` names.

    Args:
        model: the model.
        also_train: names of parameters, or their last parts.
        what: the function that this is for.

    Raises:
        ConfigError: if a name fits no parameter.
    """
    named = dict(model.named_parameters())
    kept = {
        f"{path}.{name}" if path else name
        for path, part in model.named_modules()
        if hasattr(part, "peft_config")  # PEFT has frozen what it doesn't train
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }
    for wanted in also_train:
        fitting = {n for n in named if n == wanted or n.endswith(f".{wanted}")}
        if not fitting:
            raise ConfigError(f"{what}: also_train has {wanted!r}, which fits no parameter.")
        kept |= fitting
    for name, parameter in named.items():
        parameter.requires_grad_(name in kept)


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
