"""Experts from and to Hugging Face: Mixtral, Qwen3-MoE and OLMoE. ``docs/huggingface.md``."""

from lightning_fastmoe.checkpoint.huggingface.architecture import Architecture, read_config
from lightning_fastmoe.checkpoint.huggingface.exporting import export, kept_config
from lightning_fastmoe.checkpoint.huggingface.families import FAMILIES
from lightning_fastmoe.checkpoint.huggingface.importing import import_model

__all__ = ["FAMILIES", "Architecture", "export", "import_model", "kept_config", "read_config"]
