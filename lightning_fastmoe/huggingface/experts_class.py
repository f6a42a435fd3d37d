"""What one of transformers' classes of stacked experts computes: its weights and its activation.

transformers (5.17) calls a registered function instead of the ``forward`` of each such class. The
class describes itself by ``has_gate``, ``has_bias``, ``is_transposed`` and ``is_concatenated``, and
has ``_apply_gate`` and mostly ``act_fn``. What is recognised *by identity* as one of our
activations takes the fused layer; anything else takes our order and our grouped GEMMs around the
class's own ``_apply_gate`` or ``act_fn``. Weights are never copied to another layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.huggingface.packed_experts import names_in_module, packed_of, weight_of
from lightning_fastmoe.nn.experts import lora
from lightning_fastmoe.nn.experts.grouped import groups_of
from lightning_fastmoe.nn.experts.lora import FLOATING, LORA_A, LORA_B, SCALE
from lightning_fastmoe.nn.experts.trained import TRAINED, TrainedExperts, check_frozen, trained_of
from lightning_fastmoe.ops.activation import GATED

NAME = "fastmoe"
"""What ``from_pretrained(experts_implementation=...)`` calls this implementation."""

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""Attributes by which a class describes itself."""

unknown_flags: dict[str, Any] = {}
"""Others that the decorator of the installed transformers sets, as later versions may -> what they
are by default."""

_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
GATED_OF = {plain: gated for gated, plain in GATED.items()}
"""Plain activations -> the gated ones that apply them to the gate."""
_CHILDREN = {"act_fn", TRAINED, "parametrizations"}  # torch's, by which PEFT replaces parameters
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def compute(
    experts: nn.Module,
    x: Tensor,
    tokens_per_expert: Tensor,
    weights: Tensor | None = None,
    order: ops.ExpertOrder | None = None,
) -> Tensor:
    """Applies the experts that the module holds, like
    :meth:`~lightning_fastmoe.nn.StackedExperts.forward`.

    Args:
        experts: the module, with parameters of e experts.
        x: (N, D) in the dtype of the GEMMs, grouped by expert; with ``order`` (T, D), by token.
        tokens_per_expert: (e,) int64.
        weights: (T, K), used to combine.
        order: the pairs by expert.

    Returns:
        (N, D); with ``order`` (T, D), each token's weighted sum.
    """
    rest = (x, tokens_per_expert, weights, order)
    groups = groups_of(experts)
    if groups is not None:
        grouped: Tensor = groups(functools.partial(_own, experts), *rest)
        return grouped
    trained = trained_of(experts)
    if trained is not None:
        out: Tensor = trained(functools.partial(_sparse, experts), *rest)
        return out
    return _own(experts, *rest)


def _own(experts: nn.Module, *rest: Any) -> Tensor:
    """:func:`compute` with the stacks that the module has now."""
    if packed_of(experts) is not None:
        packed: Tensor = _packed(experts, *rest)
        return packed
    return compute_with(experts, stacked_weights(experts), *rest)


# Opaque to torch.compile, which would keep the weights that are made here until the backward pass.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed(experts: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """:func:`compute` where weights are stored in 4 bits."""
    stacks = stacked_weights(experts)
    if not torch.is_grad_enabled() and not adapters_of(experts, x.dtype):
        stacks = tuple(w.make(x.dtype) if isinstance(w, ops.FrozenWeight) else w for w in stacks)
    return compute_with(experts, stacks, x, *rest)


def compute_with(
    experts: nn.Module,
    stacks: Any,
    x: Tensor,
    tokens_per_expert: Tensor,
    weights: Tensor | None,
    order: ops.ExpertOrder | None,
) -> Tensor:
    """:func:`compute` with these stacks, whatever the module holds.

    Args:
        experts: says what else is computed: the activation and the adapters.
        stacks: of e experts, in the layout of :func:`stacked_weights`.
        x: see :func:`compute`, and so for the others.
        tokens_per_expert: see there.
        weights: see there.
        order: see there.
    """
    up, down, up_bias, down_bias = _cast(stacks, x.dtype)
    name = fused_activation(experts)
    adapters = adapters_of(experts, x.dtype)
    kept = not isinstance(up, ops.FrozenWeight)
    if name is not None and not adapters and kept:
        fused = (up, down, name, up_bias, down_bias)
        if weights is None or order is None:
            return ops.expert_mlp(x, tokens_per_expert, *fused)
        return ops.expert_layer(x, weights, order, *fused)
    unfused: Any = (up, down, name or _own_activation(experts), up_bias, down_bias, *adapters)
    if weights is None or order is None:
        return ops.grouped_mlp(x, tokens_per_expert, *unfused)
    return ops.unfused_layer(x, weights, order, *unfused)


def fused_stacks(
    experts: nn.Module, dtype: torch.dtype, stacks: Any = None
) -> tuple[ops.Stacks, str] | None:
    """See :meth:`~lightning_fastmoe.nn.experts.Experts.fused_stacks`.

    Args:
        experts: the module.
        dtype: of the tokens.
        stacks: in the layout of :func:`stacked_weights`; None for the module's.
    """
    if (
        trained_of(experts)
        or groups_of(experts)
        or adapters_of(experts, dtype)
        or packed_of(experts)
    ):
        return None  # and weights in 4 bits, which must not be whole until the backward pass
    name = fused_activation(experts)
    return None if name is None else (_cast(stacks or stacked_weights(experts), dtype), name)


def _sparse(
    experts: nn.Module,
    trained: TrainedExperts,
    x: Tensor,
    tokens_per_expert: Tensor,
    weights: Tensor | None,
    order: ops.ExpertOrder | None,
) -> Tensor:
    """:func:`compute` where single experts are trained."""
    check_frozen(experts, trained)
    if adapters_of(experts, x.dtype):
        raise refused(experts, "it has adapters, and single experts are trained")
    stacks = _cast(stacked_weights(experts), x.dtype)
    rows = ops.TrainedRows(trained.rows, _cast(views(experts, trained.slices), x.dtype))
    activation = fused_activation(experts) or _own_activation(experts)
    return ops.sparse_layer(x, tokens_per_expert, weights, order, stacks, rows, activation)


def _cast(stacks: Any, dtype: torch.dtype) -> Any:
    """The stacks in ``dtype``, in which packed ones are made anyway."""
    up, down, *biases = (t.to(dtype) if isinstance(t, Tensor) else t for t in stacks)
    assert up is not None
    assert down is not None
    return up, down, biases[0], biases[1]


def fused_activation(experts: nn.Module) -> str | None:
    """The activation with which the fused layer computes these experts; None if it doesn't.

    Args:
        experts: a module of a class with transformers' ``@use_experts_implementation``.

    Returns:
        A name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`, or None: then the module's
        own activation runs between grouped GEMMs.
    """
    plain = plain_activation(getattr(experts, "act_fn", None))
    if plain is None or experts.is_transposed:
        return None
    if not experts.has_gate:
        return plain
    return GATED_OF[plain] if _gates_by_default(experts) else None


def _gates_by_default(experts: Any) -> bool:
    """Whether the gate is transformers' ``act_fn(gate) * up``, gate rows first."""
    from transformers.integrations.moe import _default_apply_gate

    own = "_apply_gate" in vars(experts)
    return not own and type(experts)._apply_gate is _default_apply_gate


def plain_activation(function: Any) -> str | None:
    """The name of the plain activation that ``function`` is, None if that is not certain."""
    if not isinstance(function, nn.Module):
        return _FUNCTIONS.get(function) if callable(function) else None
    if "forward" in vars(function) or any(getattr(function, name) for name in _HOOKS):
        return None  # its own forward, or a hook, would not be called
    from transformers.activations import GELUActivation, SiLUActivation

    if type(function) is GELUActivation:
        return "gelu" if function.act is F.gelu else None
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else None
    # These compute it whatever their attributes. Not in a cached function: dynamo warns of those.
    plain = {nn.SiLU: "silu", SiLUActivation: "silu", nn.ReLU: "relu"}
    return plain.get(type(function))


def _own_activation(experts: Any) -> Callable[[Tensor], Tensor]:
    """The class's function of the pre-activation, which may be in any layout of gate and up."""
    if not experts.has_gate:
        function = getattr(experts, "act_fn", None)
        if not callable(function):
            raise refused(experts, "it has neither a gate nor an act_fn")
        return function  # type: ignore[no-any-return]
    return experts._apply_gate  # type: ignore[no-any-return]


def stacked_weights(experts: Any) -> Any:
    """Views ``up (E, 2F or F, D)``, ``down (E, D, F)`` and the biases, if any.

    Packed weights are :class:`~lightning_fastmoe.ops.FrozenWeight`, of the same shapes.

    Raises:
        ConfigError: if there are others, or of a kind that this package can't compute with.
    """
    missing = [name for name in FLAGS if not isinstance(getattr(experts, name, None), bool)]
    if missing:
        raise refused(experts, f"it doesn't say {', '.join(missing)}")
    for flag, default in unknown_flags.items():
        if (value := getattr(experts, flag, default)) != default:
            raise refused(experts, f"it has {flag}={value}, which this package doesn't know")
    if experts.has_gate and not experts.is_concatenated and _gates_by_default(experts):
        raise refused(
            experts,
            "its gate and up rows alternate (is_concatenated=False), but it has the default"
            " _apply_gate, which takes the gate's rows to come first",
        )
    names = parameter_names(experts)
    packed = {n for w in projections(experts) for n in names_in_module(experts, w) if n != w}
    others = {name for name, _ in experts.named_parameters(recurse=False)} - {*names}
    others |= {name for name, _ in experts.named_children()} - _CHILDREN
    if others:
        raise refused(experts, f"{', '.join(sorted(others))} would be ignored")
    for name in names:
        tensor = getattr(experts, name, None)
        if not isinstance(tensor, Tensor):
            raise refused(experts, f"it has no {name}")
        if tensor.dtype not in FLOATING and name not in packed:
            raise refused(experts, f"{name} is {tensor.dtype}")
        if hasattr(tensor, "device_mesh"):
            raise refused(experts, f"{name} is sharded by transformers (a DTensor)")
    return views(experts, functools.partial(weight_of, experts))


def views(experts: Any, get: Callable[[str], Any]) -> Any:
    """The weights and biases, by name, in the layout of :func:`stacked_weights`."""
    names = stack_names(experts)
    up, down = get(names[0]), get(names[1])
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not experts.has_bias:
        return up, down, None, None
    return up, down, get(names[2]), get(names[3])


def projections(experts: Any) -> tuple[str, str]:
    """The names of both weights."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def stack_names(experts: Any) -> list[str]:
    """The names of the weights and biases, of which weights may be packed."""
    names = [*projections(experts)]
    return [*names, *(f"{name}_bias" for name in names)] if experts.has_bias else names


def parameter_names(experts: Any) -> list[str]:
    """The names of the parameters that are computed with, each (experts, ...)."""
    names = [own for name in stack_names(experts) for own in names_in_module(experts, name)]
    if SCALE in vars(experts):
        names += [f"{name}{part}" for name in projections(experts) for part in (LORA_A, LORA_B)]
    return names


def adapters_of(experts: Any, dtype: torch.dtype) -> tuple[ops.LowRank, ...]:
    """What is added to both weights (:mod:`~lightning_fastmoe.huggingface.lora`), if anything."""
    return lora.adapters_of(experts, projections(experts), dtype)


def compute_dtype(x: Tensor, weight: Tensor | ops.FrozenWeight) -> torch.dtype:
    """The dtype of the GEMMs: autocast's, which leaves fp64 alone, else the weights'.

    Packed weights have none: they are made in that of ``x``.
    """
    device = x.device.type
    own = weight.dtype if isinstance(weight, Tensor) else x.dtype
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, own):
        return torch.get_autocast_dtype(device)
    return own


def check_inputs(
    experts: Any, up: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor
) -> None:
    """Checks what transformers passed to experts with the weight ``up (e, 2F or F, D)``.

    Raises:
        ShapeError: naming the shape.
    """
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


def check_ids(ids: Tensor, num_experts: int) -> Tensor:
    """``ids`` in int64, checked without a host synchronisation to be in ``[0, num_experts]``."""
    ids = ids.to(torch.int64)
    torch._assert_async(
        ((ids >= 0) & (ids <= num_experts)).all(),
        f"top_k_index has an id outside of [0, {num_experts}]",
    )
    return ids


def only_in_range(ids: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Gives dropped slots, whose id is ``num_experts``, an expert and the weight zero.

    The row of a dropped pair repeats another of its token, where there is one: one that overflows
    would make NaN of the weight zero, and so can only do it where the output is infinite anyway.

    Args:
        ids: (T, K) int64.
        weights: (T, K).
        num_experts: E.

    Returns:
        Ids below E, and the weights.
    """
    dropped = ids == num_experts
    another = ids.amin(dim=-1, keepdim=True).clamp(max=num_experts - 1)
    return torch.where(dropped, another, ids), weights.masked_fill(dropped, 0)


def refused(experts: Any, reason: str) -> ConfigError:
    """The error for a module that this package can't compute."""
    return ConfigError(
        f'experts_implementation="{NAME}" can\'t compute {type(experts).__name__}: {reason}. Use'
        ' experts_implementation="eager".'
    )
