"""Import, fine-tune and export Hugging Face models: Mixtral, Qwen3-MoE and OLMoE.

See ``docs/huggingface.md``. This component does not import transformers, whose own models it
computes and shards under ``experts_implementation="fastmoe"``. ``MoECausalLM``, which needs
Lightning, and ``HostCache``, which is a cache of transformers, are imported on first use, so that
converting files works without either.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_fastmoe.huggingface.adapter_files import load_adapters, save_adapters
from lightning_fastmoe.huggingface.architecture import Architecture, read_config
from lightning_fastmoe.huggingface.experts_class import fused_activation
from lightning_fastmoe.huggingface.experts_interface import register_experts
from lightning_fastmoe.huggingface.exporting import export, kept_config
from lightning_fastmoe.huggingface.exporting_in_place import export_in_place
from lightning_fastmoe.huggingface.families import FAMILIES
from lightning_fastmoe.huggingface.importing import import_model
from lightning_fastmoe.huggingface.loading import from_pretrained
from lightning_fastmoe.huggingface.lora import add_lora, merge_lora
from lightning_fastmoe.huggingface.quantizing import dequantize_experts, quantize_experts
from lightning_fastmoe.huggingface.saving import save_pretrained
from lightning_fastmoe.huggingface.scoring import causal_lm_loss
from lightning_fastmoe.huggingface.sharded_experts import choose_dispatcher
from lightning_fastmoe.huggingface.upcycling import upcycle

if TYPE_CHECKING:
    from lightning_fastmoe.huggingface.causal_lm import MoECausalLM
    from lightning_fastmoe.huggingface.host_cache import HostCache

__all__ = [
    "FAMILIES",
    "Architecture",
    "HostCache",
    "MoECausalLM",
    "add_lora",
    "causal_lm_loss",
    "choose_dispatcher",
    "dequantize_experts",
    "export",
    "export_in_place",
    "from_pretrained",
    "fused_activation",
    "import_model",
    "kept_config",
    "load_adapters",
    "merge_lora",
    "quantize_experts",
    "read_config",
    "register_experts",
    "save_adapters",
    "save_pretrained",
    "upcycle",
]

_LATE = {"HostCache": "host_cache", "MoECausalLM": "causal_lm"}

if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
