"""The examples' small byte-level language model, with its data and command line."""

from lightning_fastmoe.demos.byte_lm.data import ByteCorpus
from lightning_fastmoe.demos.byte_lm.model import MoELanguageModel
from lightning_fastmoe.demos.byte_lm.progress import TrainingBar
from lightning_fastmoe.demos.byte_lm.sampling import SampleText, generate

__all__ = ["ByteCorpus", "MoELanguageModel", "SampleText", "TrainingBar", "generate"]
