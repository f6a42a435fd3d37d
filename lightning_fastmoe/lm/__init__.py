"""A small byte-level language model: what the examples train, and a place to start from."""

from lightning_fastmoe.lm.data import ByteCorpus
from lightning_fastmoe.lm.model import MoELanguageModel
from lightning_fastmoe.lm.progress import TrainingBar
from lightning_fastmoe.lm.sampling import SampleText, generate

__all__ = ["ByteCorpus", "MoELanguageModel", "SampleText", "TrainingBar", "generate"]
