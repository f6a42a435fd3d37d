"""Image classification: a vision transformer with mixtures of experts, and its data."""

from lightning_fastmoe.demos.vision.data import ImageData
from lightning_fastmoe.demos.vision.model import ImageClassifier
from lightning_fastmoe.demos.vision.network import SwinMoE

__all__ = ["ImageClassifier", "ImageData", "SwinMoE"]
