"""Names of tensors in a checkpoint: what they hold, and of which parameter or buffer."""

from __future__ import annotations

import re

from lightning_fastmoe.checkpoint.format.fragment import Fragment

WEIGHTS, OPTIMIZER, GRADIENTS = "weights", "optimizer", "gradients"

TENSOR_NAME = re.compile(r"(weights|optimizer/[^/]+|gradients/(mean|local))/.+", re.DOTALL)
"""What every name matches."""


def weight_name(name: str) -> str:
    """Name of the tensor that holds a parameter or buffer."""
    return f"{WEIGHTS}/{name}"


def state_name(state: str, name: str) -> str:
    """Name of the tensor that holds an optimizer state of a parameter."""
    return f"{OPTIMIZER}/{state}/{name}"


def gradient_name(name: str, is_local: bool) -> str:
    """Name of the tensor that holds the partly accumulated gradient of a parameter.

    Args:
        name: the name of the parameter.
        is_local: whether it has one gradient per replica of the parameter, from that replica's own
            batches, along an additional first dimension; otherwise it is the average.
    """
    return f"{GRADIENTS}/{'local' if is_local else 'mean'}/{name}"


def split_name(tensor: str) -> tuple[str | None, str]:
    """(kind, parameter or buffer name); kind is an optimizer state, "gradients/..." or None."""
    if tensor.startswith(WEIGHTS + "/"):
        return None, tensor.split("/", 1)[1]
    kind, state, name = tensor.split("/", 2)
    return (state if kind == OPTIMIZER else f"{kind}/{state}"), name


TRAINED_EXPERTS = ".experts.trained."
"""Inside the names of parameters that repeat rows of a stack, of which single experts are trained.

Only checkpoints to resume from hold them, in the optimizer's precision.
"""


def repeats_rows(name: str) -> bool:
    """Whether a parameter holds trained experts whose rows its layer's stack holds, too."""
    return TRAINED_EXPERTS in name


def fragment_key(tensor: str, fragment: Fragment) -> str:
    """The name of a tensor's fragment inside its safetensors file."""
    return f"{tensor}[{fragment.start}:{fragment.stop}]"
