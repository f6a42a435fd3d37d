"""The experts of a layer: stacked FFNs, custom modules, and the shared expert."""

from lightning_fastmoe.nn.experts.base import Experts
from lightning_fastmoe.nn.experts.init import draw_layer_seed, expert_generator, init_experts_
from lightning_fastmoe.nn.experts.modules import ExpertFactory, ModuleExperts
from lightning_fastmoe.nn.experts.shared import SharedExpert
from lightning_fastmoe.nn.experts.stacked import StackedExperts

__all__ = [
    "ExpertFactory",
    "Experts",
    "ModuleExperts",
    "SharedExpert",
    "StackedExperts",
    "draw_layer_seed",
    "expert_generator",
    "init_experts_",
]
