"""Expert parallelism for PyTorch Lightning.

Importing the package registers ``strategy="fastmoe"`` and its variants with Lightning's Trainer.
"""

from pytorch_lightning.strategies import StrategyRegistry

from lightning_fastmoe.callbacks import ExpertLoadMonitor
from lightning_fastmoe.nn import MoE, moe_losses
from lightning_fastmoe.strategy import FastMoEStrategy

__version__ = "0.1.0"

FastMoEStrategy.register_strategies(StrategyRegistry)

__all__ = ["ExpertLoadMonitor", "FastMoEStrategy", "MoE", "moe_losses"]
