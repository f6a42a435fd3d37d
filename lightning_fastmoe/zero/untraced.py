"""What ZeRO 3 adds to a model, kept out of graphs of ``torch.compile``.

A graph breaks at every module whose weights are gathered, so that nothing is lost by it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

_linear = torch.compiler.disable(zero3_linear_wrap)


def leave_to_python(offload: DeepSpeedZeRoOffload) -> None:
    """Keeps ``torch.compile`` from tracing what gathers, uses and releases weights.

    DeepSpeed (0.19) replaces ``F.linear`` by an autograd function that adds the bias in place.
    Where torch 2.11 traces it, all of its gradients are zeros (see
    :func:`~lightning_fastmoe.ops.kernels.rounded`). It also leaves the hooks that run after a
    module to be traced, which takes seconds.

    Args:
        offload: what has registered the hooks.
    """
    if F.linear is zero3_linear_wrap:
        F.linear = _linear
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            hooks[handle.id] = torch.compiler.disable(hooks[handle.id])


def restore_linear() -> None:
    """Gives the process back the ``F.linear`` of torch, which rounds differently."""
    if F.linear in (zero3_linear_wrap, _linear):
        F.linear = partition_parameters.InsertPostInitMethodToModuleSubClasses.linear_bk
