"""ZeRO 3 on the CPU: detects ranks that are about to gather different parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from lightning_fastmoe.zero.groups import is_tagged


def meet_before_gathering(engine: Any, meet: Callable[[str], None]) -> None:
    """Synchronises ranks before a module's parameters are gathered, which all must do.

    If one rank skips a layer, the ranks would gather tensors of different sizes from each other,
    and gloo aborts the process without naming a layer. With NCCL, token exchanges and gathers share
    a stream, so ranks don't synchronise here: the next exchange of counts, or its deadline, should
    raise the error. docs/benchmarks.md says which cases of this have passed on a GPU.

    Args:
        engine: the engine, at stage 3.
        meet: synchronises the ranks; called with a description of where this rank is.
    """
    # In evaluation there is no optimizer, and the engine holds the offload in its place.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    coordinator = offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module
    names = {id(module): name for name, module in engine.module.named_modules()}

    def fetch_together(module: nn.Module, forward: bool) -> None:
        # Experts are gathered from their replicas only, and other ranks may run other experts.
        if any(
            not is_tagged(parameter) and parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
            for parameter in module.parameters(recurse=False)
        ):
            meet(f"the parameters of {names.get(id(module), type(module).__name__)}")
        fetch(module, forward)

    coordinator.fetch_sub_module = fetch_together
