"""A small byte-level language model, which the examples train, its data and its command line."""

from lightning_fastmoe.demos.byte_lm.data import ByteCorpus
from lightning_fastmoe.demos.byte_lm.model import MoELanguageModel
from lightning_fastmoe.demos.byte_lm.progress import TrainingBar
from lightning_fastmoe.demos.byte_lm.sampling import SampleText, generate

__all__ = ["ByteCorpus", "MoELanguageModel", "SampleText", "TrainingBar", "generate"]
