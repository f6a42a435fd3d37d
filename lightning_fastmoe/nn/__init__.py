"""The MoE layer and its parts as ``torch.nn`` modules; needs neither Lightning nor DeepSpeed."""

from lightning_fastmoe.nn.collect import moe_layers, moe_losses
from lightning_fastmoe.nn.compilation import compile_blocks, trace_layers
from lightning_fastmoe.nn.conversion import convert
from lightning_fastmoe.nn.dispatch import Dispatcher, LocalDispatcher
from lightning_fastmoe.nn.experts import Experts, ModuleExperts, StackedExperts
from lightning_fastmoe.nn.lora import add_lora, merge_lora
from lightning_fastmoe.nn.moe import MoE
from lightning_fastmoe.nn.options import CausalityWarning
from lightning_fastmoe.nn.router import Router, Routing, RoutingContext, SoftmaxTopKRouter
from lightning_fastmoe.nn.schedule import LocalSchedule, Schedule, SequentialSchedule

__all__ = [
    "CausalityWarning",
    "Dispatcher",
    "Experts",
    "LocalDispatcher",
    "LocalSchedule",
    "MoE",
    "ModuleExperts",
    "Router",
    "Routing",
    "RoutingContext",
    "Schedule",
    "SequentialSchedule",
    "SoftmaxTopKRouter",
    "StackedExperts",
    "add_lora",
    "compile_blocks",
    "convert",
    "merge_lora",
    "moe_layers",
    "moe_losses",
    "trace_layers",
]
