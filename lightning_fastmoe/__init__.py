"""Expert parallelism for PyTorch Lightning.

Importing the package registers ``strategy="fastmoe"`` and its variants with Lightning's Trainer,
lets ``load_from_checkpoint`` of any module read this package's checkpoints, and registers
``experts_implementation="fastmoe"`` with transformers. It imports neither torch nor Lightning nor
DeepSpeed nor transformers: exported names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_fastmoe.former_paths import serve_former_paths
from lightning_fastmoe.lightning_loaders import register_loaders
from lightning_fastmoe.registration import register_with_lightning, when_imported

if TYPE_CHECKING:
    from lightning_fastmoe.callbacks import (
        CapacitySchedule,
        CoActivationMonitor,
        ExpertLoadMonitor,
        MoESummary,
        RouterBiasBalancing,
        SparseUpdate,
        ThroughputMonitor,
        select_experts,
    )
    from lightning_fastmoe.nn import MoE, moe_losses
    from lightning_fastmoe.strategy import FastMoEStrategy, OffloadDDPStrategy, OffloadStrategy

__version__ = "0.1.0"

__all__ = [
    "CapacitySchedule",
    "CoActivationMonitor",
    "ExpertLoadMonitor",
    "FastMoEStrategy",
    "MoE",
    "MoESummary",
    "OffloadDDPStrategy",
    "OffloadStrategy",
    "RouterBiasBalancing",
    "SparseUpdate",
    "ThroughputMonitor",
    "moe_losses",
    "select_experts",
]

_COMPONENTS = (
    "callbacks",
    "checkpoint",
    "distributed",
    "errors",
    "inference",
    "metrics",
    "nn",
    "ops",
    "strategy",
)
_HOMES = {  # the rest: callbacks
    "FastMoEStrategy": "strategy",
    "MoE": "nn",
    "OffloadDDPStrategy": "strategy",
    "OffloadStrategy": "strategy",
    "moe_losses": "nn",
}


def _load(name: str) -> Any:
    if name in _COMPONENTS:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'callbacks')}"), name)
        globals()[name] = value  # later accesses bypass this function
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_COMPONENTS})


serve_former_paths()
register_with_lightning(lambda kind, **arguments: _load(kind)(**arguments))
register_loaders(lambda: import_module(f"{__name__}.strategy.checkpointing.plain_loading"))
when_imported(
    {
        "transformers.integrations.moe": lambda module: import_module(
            f"{__name__}.huggingface.experts_interface"
        ).register_in(module)
    }
)
