"""Expert parallelism for PyTorch Lightning.

Importing the package registers ``strategy="fastmoe"`` and its variants with Lightning's Trainer,
and lets ``load_from_checkpoint`` of any module read this package's checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_fastmoe.commands import starts_as_own_command

__version__ = "0.1.0"

if TYPE_CHECKING or not starts_as_own_command():
    from pytorch_lightning.strategies import StrategyRegistry

    from lightning_fastmoe.callbacks import (
        CapacitySchedule,
        CoActivationMonitor,
        ExpertLoadMonitor,
        MoESummary,
        RouterBiasBalancing,
        ThroughputMonitor,
    )
    from lightning_fastmoe.nn import MoE, moe_losses
    from lightning_fastmoe.strategy import FastMoEStrategy
    from lightning_fastmoe.strategy.plain_loading import register_loaders

    register_loaders()
    FastMoEStrategy.register_strategies(StrategyRegistry)
else:
    # `lightning-fastmoe env` and its like start without Lightning and DeepSpeed; code that they
    # load may still ask for what the package exports.
    def __getattr__(name: str) -> Any:
        if name in __all__:
            for component in ("callbacks", "nn", "strategy"):
                module = import_module(f"{__name__}.{component}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CapacitySchedule",
    "CoActivationMonitor",
    "ExpertLoadMonitor",
    "FastMoEStrategy",
    "MoE",
    "MoESummary",
    "RouterBiasBalancing",
    "ThroughputMonitor",
    "moe_losses",
]
