"""FastMoEStrategy: wiring between Lightning, DeepSpeed and the MoE layers; OffloadStrategy."""

from lightning_fastmoe.zero import config as _config  # noqa: F401, I001  first
from lightning_fastmoe.strategy.fastmoe import FastMoEStrategy
from lightning_fastmoe.strategy.offload import OffloadStrategy
from lightning_fastmoe.strategy.offload_ddp import OffloadDDPStrategy

__all__ = ["FastMoEStrategy", "OffloadDDPStrategy", "OffloadStrategy"]
