"""ZeRO 3's leaf modules: those that DeepSpeed gathers as a whole, for experts that take turns.

DeepSpeed (0.19) reduces a leaf module's gradients in a full backward hook of the module, zeros for
those that are missing. But torch calls such a hook before any gradient exists if none of the
tensors among the module's positional arguments requires one: behind a frozen prefix, with adapters
or by keyword, the zeros are reduced, and the gradients are lost or fail in the next accumulated
backward pass. Three of transformers' MoE blocks are leaf modules by default. Experts that this
package computes never need it, since each rank computes with all of its parameters in every pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError


def guard_leaf_modules(model: nn.Module, experts: Iterable[nn.Parameter]) -> None:
    """Refuses leaf modules that would train wrongly.

    Args:
        model: what the engine trains.
        experts: the parameters of the experts that this package computes.

    Raises:
        ConfigError: if one is inside of a leaf module; and in a forward pass of another leaf module
            whose gradients would be lost.
    """
    own = {id(parameter) for parameter in experts}
    for name, module in model.named_modules():
        if z3_leaf_module(module):
            if not own.isdisjoint(id(parameter) for parameter in module.parameters()):
                raise ConfigError(
                    f"{name} ({type(module).__name__}) is a leaf module of ZeRO 3, and has experts"
                    " that FastMoEStrategy shards. They don't need it: drop leaf_module and"
                    " stage3_module_granularity_threshold from the DeepSpeed config, or"
                    " set_z3_leaf_modules() from your code."
                )
            module.register_forward_pre_hook(_refuse_lost_gradients)


def _refuse_lost_gradients(module: nn.Module, args: tuple[Any, ...]) -> None:
    # In eval mode too: transformers' from_pretrained sets it, and Lightning leaves it.
    inputs = [value for value in args if isinstance(value, Tensor)]
    if (
        torch.is_grad_enabled()
        and any(parameter.requires_grad for parameter in module.parameters())
        and not any(tensor.requires_grad for tensor in inputs)
    ):
        raise ConfigError(
            f"A {type(module).__name__} is a leaf module of ZeRO 3 and is trained, but no tensor"
            " among its positional arguments requires gradients, so DeepSpeed would reduce its"
            " gradients before they exist. Pass such a tensor by position, train something before"
            " it, or use ZeRO stage 2."
        )
