"""A small byte-level language model, which the examples train, and models from Hugging Face."""

from lightning_fastmoe.lm.causal_lm import MoECausalLM
from lightning_fastmoe.lm.data import ByteCorpus
from lightning_fastmoe.lm.model import MoELanguageModel
from lightning_fastmoe.lm.progress import TrainingBar
from lightning_fastmoe.lm.sampling import SampleText, generate

__all__ = ["ByteCorpus", "MoECausalLM", "MoELanguageModel", "SampleText", "TrainingBar", "generate"]
