"""Low-rank adapters (LoRA, arXiv:2106.09685) on stacked experts.

An expert's weight W is frozen, and ``alpha / rank * B A`` added to it, by two narrow grouped GEMMs
on the expert's rows: the sum is never formed. Adapters are parameters of the module that has the
weights, with a row for each expert, so they are sharded, saved by global id and resharded with
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.nn.experts.init import draw_layer_seed, init_experts_
from lightning_fastmoe.nn.experts.trained import trained_of

LORA_A, LORA_B = "_lora_a", "_lora_b"
"""Ends of the names of a weight's adapter: (e, r, inputs) and (e, outputs, r)."""
SCALE = "fastmoe_lora_scale"
"""The attribute of modules that have adapters: ``alpha / rank``."""
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that weights may have."""


def check_options(rank: Any, alpha: Any, also_train: Any) -> float:
    """Checks the arguments of ``add_lora``; returns ``alpha / rank``.

    Raises:
        ConfigError: if one is out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank={rank!r} must be a positive integer.")
    alpha = 2 * rank if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ConfigError(f"alpha={alpha!r} must be a positive number.")
    if isinstance(also_train, str):
        raise ConfigError(f"also_train={also_train!r} must be a list of names.")
    return float(alpha / rank)


def check_holder(path: str, holder: nn.Module, weights: Iterable[str]) -> None:
    """Refuses weights that can't get adapters.

    Args:
        path: the module's name, for errors.
        holder: has the stacks.
        weights: their names.

    Raises:
        ConfigError: naming the module or the weight.
    """
    if SCALE in vars(holder):
        raise ConfigError(f"add_lora: {path} has adapters already.")
    if trained_of(holder) is not None:
        raise ConfigError(
            f"add_lora: SparseUpdate trains single experts of {path}. Train adapters or"
            " single experts: call SparseUpdate.release(model) first."
        )
    for name in weights:
        weight = holder.get_parameter(name)
        if weight.is_meta:
            raise ConfigError(
                f"add_lora: {path}.{name} has no memory yet, so its adapter would never be"
                " initialised. Load the weights first."
            )
        if weight.dtype not in FLOATING:
            raise ConfigError(
                f"add_lora: {path}.{name} is quantised ({weight.dtype}), and adapters are"
                " trained next to weights of 16 bits or more, or those of"
                " huggingface.quantize_experts. Load the model dequantised."
            )


def freeze(model: nn.Module, also_train: Iterable[str], kept: Iterable[str] = ()) -> None:
    """Freezes all parameters but those of ``kept``, and those that ``also_train`` fits.

    Raises:
        ConfigError: if a name of ``also_train`` fits none; nothing is frozen then.
    """
    named, trained = dict(model.named_parameters()), set(kept)
    for wanted in also_train:
        fitting = {n for n in named if n == wanted or n.endswith(f".{wanted}")}
        if not fitting:
            raise ConfigError(f"add_lora: also_train has {wanted!r}, which fits no parameter.")
        trained |= fitting
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


def check_trained(model: nn.Module) -> None:
    """Refuses to train a model whose adapters are all frozen, as PEFT leaves them.

    Raises:
        ConfigError: naming the first.
    """
    holders = (part for part in model.modules() if SCALE in vars(part))
    adapters = {
        id(parameter)
        for part in holders
        for name, parameter in part.named_parameters(recurse=False)
        if name.endswith((LORA_A, LORA_B))
    }
    named = [(n, p) for n, p in model.named_parameters() if id(p) in adapters]
    if named and not any(p.requires_grad for _, p in named):
        raise ConfigError(
            f"{named[0][0]} is frozen, and so are all adapters of experts: get_peft_model() freezes"
            " what it finds, so call it before add_lora(). Adapters that are to stay as they are"
            " belong into the weights: merge_lora(model)."
        )


@torch.no_grad()
def add_adapters(
    holder: nn.Module,
    stacks: Mapping[str, Tensor],
    rank: int,
    scale: float,
    *,
    expert_ids: Sequence[int],
    transposed: bool = False,
) -> list[str]:
    """Adds adapters to the stacks of a layer; A random by global id, B zero.

    Args:
        holder: gets them.
        stacks: name -> (e, outputs, inputs), or (e, inputs, outputs) if ``transposed``. Adapters
            get its dtype and device; its values don't matter.
        rank: r.
        scale: ``alpha / rank``.
        expert_ids: global ids of the e experts.
        transposed: the layout of the stacks.

    Returns:
        The adapters' names in ``holder``.
    """
    seed = draw_layer_seed()
    names = []
    vars(holder)[SCALE] = scale
    for name, weight in stacks.items():
        inputs, outputs = weight.shape[1:] if transposed else weight.shape[:0:-1]
        held = weight.shape[0]
        a = weight.new_empty(held, rank, inputs)
        init_experts_(
            a,
            name=f"{name}{LORA_A}",
            layer_seed=seed,
            expert_ids=expert_ids,
            fan_in=inputs,
            std=None,
        )
        for part, value in ((LORA_A, a), (LORA_B, weight.new_zeros(held, outputs, rank))):
            holder.register_parameter(f"{name}{part}", nn.Parameter(value))
            names.append(f"{name}{part}")
    return names


@torch.no_grad()
def merge_adapters(holder: nn.Module, weights: Iterable[str], *, transposed: bool = False) -> None:
    """Adds the adapters of a layer to its stacks, in fp32 at least, and removes them."""
    for name in weights:
        weight = holder.get_parameter(name)
        weight.copy_(take_adapter(holder, name, weight, transposed=transposed))
    del vars(holder)[SCALE]


@torch.no_grad()
def take_adapter(
    holder: nn.Module, name: str, weight: Tensor, *, transposed: bool = False
) -> Tensor:
    """Removes the adapter of one stack, and returns ``weight`` with it, see :func:`merged_weight`.

    Who takes the last one of a module deletes its :data:`SCALE`.
    """
    a, b = (holder.get_parameter(f"{name}{part}") for part in (LORA_A, LORA_B))
    merged = merged_weight(weight, a, b, vars(holder)[SCALE], transposed=transposed)
    for part in (LORA_A, LORA_B):
        delattr(holder, f"{name}{part}")
    return merged


def merged_weight(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, *, transposed: bool = False
) -> Tensor:
    """``weight`` with ``scale * b @ a`` of each expert added, computed in fp32 at least.

    Args:
        weight: (E, outputs, inputs), or (E, inputs, outputs) if ``transposed``; as a and b, of a
            linear layer without E.
        a: (E, r, inputs).
        b: (E, outputs, r).
        scale: multiplies the product.
        transposed: the layout of ``weight``.

    Returns:
        Like ``weight``.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    added = scale * (b.to(dtype) @ a.to(dtype))
    return (weight.to(dtype) + (added.mT if transposed else added)).to(weight.dtype)


def adapters_of(
    holder: nn.Module, weights: Iterable[str], dtype: torch.dtype
) -> tuple[ops.LowRank, ...]:
    """What is added to each of the stacks; empty without adapters.

    Args:
        holder: has the stacks.
        weights: their names.
        dtype: that of the GEMMs.
    """
    scale = getattr(holder, SCALE, None)
    if scale is None:
        return ()
    return tuple(
        ops.LowRank(
            getattr(holder, f"{name}{LORA_A}").to(dtype),
            getattr(holder, f"{name}{LORA_B}").to(dtype),
            scale,
        )
        for name in weights
    )


SCALES = "fastmoe_adapter_scales"
"""The key of :func:`adapter_scales` among what a checkpoint holds besides tensors."""


def adapter_scales(model: nn.Module) -> dict[str, float]:
    """What each adapter in a model is multiplied by, PEFT's of linear layers included.

    Matrices alone don't tell it, so checkpoints have it beside them.

    Returns:
        Name of A -> ``alpha / rank``.
    """
    found: dict[str, float] = {}
    for path, part in model.named_modules():
        prefix = f"{path}." if path else ""
        prefix = prefix.replace("_orig_mod.", "")
        if SCALE in vars(part):
            for name, _ in part.named_parameters(recurse=False):
                if name.endswith(LORA_A):
                    found[f"{prefix}{name}"] = float(vars(part)[SCALE])
        scaling, matrices = getattr(part, "scaling", None), getattr(part, "lora_A", None)
        if isinstance(scaling, Mapping) and isinstance(matrices, nn.ModuleDict):
            for key in matrices:
                found[f"{prefix}lora_A.{key}.weight"] = float(scaling[key])
    return found


def check_same_scales(stored: Any, model: nn.Module) -> None:
    """Refuses to go on with a checkpoint whose adapters were scaled otherwise.

    Args:
        stored: what the checkpoint has under :data:`SCALES`; None if it has nothing.
        model: into which it is loaded.

    Raises:
        CheckpointError: naming an adapter and both scales.
    """
    here = adapter_scales(model)
    for name, scale in (stored or {}).items():
        if name in here and not math.isclose(here[name], scale, rel_tol=1e-6):
            raise CheckpointError(
                f"The checkpoint's adapter {name} is multiplied by alpha / rank = {scale}, and here"
                f" by {here[name]}: give the same alpha."
            )
