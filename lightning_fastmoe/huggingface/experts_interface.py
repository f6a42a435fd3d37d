"""The experts of transformers' models, computed by this package: ``experts_implementation=NAME``.

transformers (5.17) calls a registered function instead of the ``forward`` of each class of stacked
experts. Such a class describes itself by ``has_gate``, ``has_bias``, ``is_transposed`` and
``is_concatenated``, and has ``_apply_gate`` and mostly ``act_fn``. What is recognised *by
identity* as one of our activations takes the fused layer; anything else takes our order and our
grouped GEMMs around the class's own ``_apply_gate`` or ``act_fn``. Weights are never copied to
another layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError, MissingPackageError, ShapeError
from lightning_fastmoe.ops.activation import GATED
from lightning_fastmoe.ops.kernels import accumulation_dtype

NAME = "fastmoe"
"""What ``from_pretrained(experts_implementation=...)`` calls this implementation."""

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
_GATED_OF = {plain: gated for gated, plain in GATED.items()}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def register_in(module: ModuleType) -> None:
    """Registers :data:`NAME`; ``import lightning_fastmoe`` arranges it.

    Args:
        module: ``transformers.integrations.moe``, just imported.
    """
    interface = getattr(module, "ExpertsInterface", None)
    if interface is not None:  # transformers before 5 calls an unknown name unknown
        interface.register(NAME, experts_forward)


def register_experts() -> str:
    """Imports transformers and registers the implementation, which an import does by itself.

    Returns:
        The name for ``experts_implementation=``.

    Raises:
        MissingPackageError: if transformers is missing, or has no experts interface.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise MissingPackageError(
            f'experts_implementation="{NAME}" needs transformers 5.17 or newer ({error}):'
            " pip install 'transformers>=5.17,<6'."
        ) from error
    ExpertsInterface.register(NAME, experts_forward)
    return NAME


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Each token's weighted sum of its experts' outputs; what transformers calls.

    Equal to the class's own ``forward`` up to rounding. Under autocast the GEMMs run in its dtype,
    as ``F.linear`` does.

    Args:
        self: the module with all experts of one layer, on this device.
        hidden_states: (T, D).
        top_k_index: (T, K) ids in ``[0, E]``. E is transformers' id of a dropped slot, which adds
            nothing. On the CPU it is not computed; elsewhere, where leaving it out would need a
            host synchronisation, it is computed with weight zero.
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of ``hidden_states``.

    Raises:
        ConfigError: if the class has something that would be ignored.
        ShapeError: for other shapes.
    """
    up, down, up_bias, down_bias = _weights(self)
    _check_shapes(self, up, hidden_states, top_k_index, top_k_weights)
    dtype = _compute_dtype(hidden_states, up)
    x, up, down = hidden_states.to(dtype), up.to(dtype), down.to(dtype)
    up_bias, down_bias = (None if b is None else b.to(dtype) for b in (up_bias, down_bias))
    on_host = x.device.type == "cpu" and not torch.compiler.is_compiling()
    order, weights = _order(top_k_index, top_k_weights, up.shape[0], on_host)
    weights = weights.to(accumulation_dtype(dtype))
    name = fused_activation(self)
    if name is not None:
        out = ops.expert_layer(x, weights, order, up, down, name, up_bias, down_bias)
    else:
        function = _own_activation(self)
        out = ops.unfused_layer(x, weights, order, up, down, function, up_bias, down_bias)
    return out.to(hidden_states.dtype)


def fused_activation(experts: nn.Module) -> str | None:
    """The activation with which the fused layer computes these experts; None if it doesn't.

    Args:
        experts: a module of a class with transformers' ``@use_experts_implementation``.

    Returns:
        A name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`, or None: then the module's
        own activation runs between grouped GEMMs.
    """
    plain = _plain_activation(getattr(experts, "act_fn", None))
    if plain is None or experts.is_transposed:
        return None
    if not experts.has_gate:
        return plain
    return _GATED_OF[plain] if _gates_by_default(experts) else None


def _gates_by_default(experts: Any) -> bool:
    """Whether the gate is transformers' ``act_fn(gate) * up``, gate rows first."""
    from transformers.integrations.moe import _default_apply_gate

    own = "_apply_gate" in vars(experts)
    return not own and type(experts)._apply_gate is _default_apply_gate


@functools.cache
def _modules() -> dict[type[nn.Module], str]:
    """The modules that compute a plain activation of ours, whatever their attributes."""
    from transformers.activations import SiLUActivation

    return {nn.SiLU: "silu", SiLUActivation: "silu", nn.ReLU: "relu"}


def _plain_activation(function: Any) -> str | None:
    """The name of the plain activation that ``function`` is, None if that is not certain."""
    if not isinstance(function, nn.Module):
        return _FUNCTIONS.get(function) if callable(function) else None
    if "forward" in vars(function) or any(getattr(function, name) for name in _HOOKS):
        return None  # its own forward, or a hook, would not be called
    from transformers.activations import GELUActivation

    if type(function) is GELUActivation:
        return "gelu" if function.act is F.gelu else None
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else None
    return _modules().get(type(function))


def _own_activation(experts: Any) -> Callable[[Tensor], Tensor]:
    """The class's function of the pre-activation, which may be in any layout of gate and up."""
    if not experts.has_gate:
        function = getattr(experts, "act_fn", None)
        if not callable(function):
            raise _refused(experts, "it has neither a gate nor an act_fn")
        return function  # type: ignore[no-any-return]
    return experts._apply_gate  # type: ignore[no-any-return]


def _weights(experts: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Views ``up (E, 2F or F, D)``, ``down (E, D, F)`` and the biases, if any.

    Raises:
        ConfigError: if there are others, or of a kind that this package can't compute with.
    """
    missing = [name for name in _FLAGS if not isinstance(getattr(experts, name, None), bool)]
    if missing:
        raise _refused(experts, f"it doesn't say {', '.join(missing)}")
    if experts.has_gate and not experts.is_concatenated and _gates_by_default(experts):
        raise _refused(
            experts,
            "its gate and up rows alternate (is_concatenated=False), but it has the default"
            " _apply_gate, which takes the gate's rows to come first",
        )
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [up_name, "down_proj"]
    if experts.has_bias:
        names += [f"{name}_bias" for name in names]
    others = {name for name, _ in experts.named_parameters(recurse=False)} - {*names}
    if others:
        raise _refused(experts, f"{', '.join(sorted(others))} would be ignored")
    for name in names:
        tensor = getattr(experts, name, None)
        if not isinstance(tensor, Tensor):
            raise _refused(experts, f"it has no {name}")
        if tensor.dtype not in _DTYPES:
            raise _refused(experts, f"{name} is {tensor.dtype}")
        if hasattr(tensor, "device_mesh"):
            raise _refused(experts, f"{name} is sharded by transformers (a DTensor)")
    up, down = getattr(experts, up_name), experts.down_proj
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not experts.has_bias:
        return up, down, None, None
    return up, down, getattr(experts, f"{up_name}_bias"), experts.down_proj_bias


def _check_shapes(
    experts: Any, up: Tensor, hidden_states: Tensor, ids: Tensor, weights: Tensor
) -> None:
    if hidden_states.dim() != 2 or hidden_states.shape[1] != up.shape[2]:
        raise ShapeError(
            f"hidden_states {tuple(hidden_states.shape)} of {type(experts).__name__} must be"
            f" (tokens, {up.shape[2]})."
        )
    if ids.dim() != 2 or ids.shape[0] != hidden_states.shape[0] or weights.shape != ids.shape:
        raise ShapeError(
            f"top_k_index {tuple(ids.shape)} and top_k_weights {tuple(weights.shape)} of"
            f" {type(experts).__name__} must both be ({hidden_states.shape[0]}, top_k)."
        )
    if experts.num_experts != up.shape[0]:
        raise ShapeError(
            f"{type(experts).__name__} has num_experts={experts.num_experts}, but weights of"
            f" {up.shape[0]} experts."
        )


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the GEMMs: autocast's, which leaves fp64 alone, else the weights'."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _order(
    ids: Tensor, weights: Tensor, num_experts: int, on_host: bool
) -> tuple[ops.ExpertOrder, Tensor]:
    """The pairs by expert, and their weights.

    Args:
        ids: (T, K) in ``[0, E]``; a slot with E adds nothing.
        weights: (T, K).
        num_experts: E.
        on_host: whether reading the number of pairs costs nothing: then dropped pairs have no row.
    """
    ids = ids.to(torch.int64)
    torch._assert_async(
        ((ids >= 0) & (ids <= num_experts)).all(),
        f"top_k_index has an id outside of [0, {num_experts}]",
    )
    if on_host:
        order = ops.order_by_expert(ids, num_experts + 1)
        return order.first(num_experts, int(order.offsets[num_experts - 1])), weights
    # The row of a dropped pair repeats another of its token, where there is one: one that
    # overflows would make NaN of the weight zero, and so can only do it where the output is
    # infinite anyway.
    dropped = ids == num_experts
    another = ids.amin(dim=-1, keepdim=True).clamp(max=num_experts - 1)
    ids = torch.where(dropped, another, ids)
    return ops.order_by_expert(ids, num_experts), weights.masked_fill(dropped, 0)


def _refused(experts: Any, reason: str) -> ConfigError:
    return ConfigError(
        f'experts_implementation="{NAME}" can\'t compute {type(experts).__name__}: {reason}. Use'
        ' experts_implementation="eager".'
    )
