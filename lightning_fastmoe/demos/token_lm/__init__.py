"""Pretraining on text: token files, a data module that serves them, and a model to train."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_fastmoe.demos.token_lm.data import TokenFiles
    from lightning_fastmoe.demos.token_lm.model import TokenLM

__all__ = ["TokenFiles", "TokenLM"]
_HOMES = {"TokenFiles": "data", "TokenLM": "model"}

if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        # On first use, because writing token files needs neither torch nor Lightning.
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
