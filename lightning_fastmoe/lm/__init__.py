"""The former location of the language models, for scripts and configurations that still use it.

They are now in ``demos.byte_lm`` (the example) and ``huggingface`` (imported models), and are
imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_fastmoe.demos.byte_lm import (
        ByteCorpus,
        MoELanguageModel,
        SampleText,
        TrainingBar,
        generate,
    )
    from lightning_fastmoe.huggingface import MoECausalLM

__all__ = ["ByteCorpus", "MoECausalLM", "MoELanguageModel", "SampleText", "TrainingBar", "generate"]

if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = "huggingface" if name == "MoECausalLM" else "demos.byte_lm"
        return getattr(import_module(f"lightning_fastmoe.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
