"""Routers: modules that choose experts. One file per family."""

from lightning_fastmoe.nn.router.base import Routing
from lightning_fastmoe.nn.router.losses import load_balancing_loss, z_loss
from lightning_fastmoe.nn.router.softmax import SoftmaxTopKRouter

ROUTERS = {"softmax": SoftmaxTopKRouter}
"""Routers by the name that ``MoE(router=...)`` takes."""

__all__ = ["ROUTERS", "Routing", "SoftmaxTopKRouter", "load_balancing_loss", "z_loss"]
