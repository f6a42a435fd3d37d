"""Keeps models that ZeRO 3 has partitioned from writing files without their weights.

``save_pretrained`` of transformers and PEFT writes the parameters that a module holds. At stage 3
those are empty between two passes, and so would be the tensors in the files, without an error.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from lightning_fastmoe.errors import ConfigError

_NAMES = ("save_pretrained", "push_to_hub")


def guard_partitioned(module: nn.Module) -> None:
    """Makes models inside ``module`` refuse to be saved while parameters are partitioned."""
    for part in module.modules():
        for name in _NAMES:
            if callable(getattr(part, name, None)) and name not in vars(part):
                vars(part)[name] = _OnlyWhole(part, name)


class _OnlyWhole:
    """Replaces a method of a model that writes its weights."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model, self._name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in self._model.named_parameters():
            status = getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE)
            if status is not ZeroParamStatus.AVAILABLE and kwargs.get("state_dict") is None:
                raise ConfigError(
                    f"{self._name} of {type(self._model).__name__} would write empty weights: ZeRO"
                    f" 3 has partitioned {name} over the ranks. On every rank call"
                    " lightning_fastmoe.huggingface.save_pretrained(trainer, path), or"
                    " save_adapters(trainer, path) for adapters alone; or save a checkpoint and use"
                    " `lightning-fastmoe checkpoint export`."
                )
        return getattr(type(self._model), self._name)(self._model, *args, **kwargs)
