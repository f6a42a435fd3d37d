"""Builds a MoE layer's router and experts from its arguments, and refuses invalid ones."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.experts import (
    ExpertFactory,
    Experts,
    ModuleExperts,
    SharedExpert,
    StackedExperts,
)
from lightning_fastmoe.nn.router import ROUTERS, Router
from lightning_fastmoe.nn.router.traits import RouterTraits

RouterArgument = str | nn.Module | Callable[..., nn.Module]


class CausalityWarning(UserWarning):
    """A router that looks at later tokens is used in an autoregressive model."""


def make_router(
    router: RouterArgument,
    options: Mapping[str, Any] | None,
    d_model: int,
    num_experts: int,
    top_k: int | None,
    normalize_weights: bool | None,
    init_std: float | None,
) -> nn.Module:
    """The router of a layer, from a name, a class path, a class, a function or a module.

    Raises:
        ConfigError: if it is unknown or doesn't accept the options it is given.
    """
    if isinstance(router, nn.Module):
        return _own_router(router, options, num_experts, top_k, normalize_weights)
    factory = _find(router) if isinstance(router, str) else router
    if not callable(factory):
        raise ConfigError(f"router={router!r} is neither a name, a module nor a class of modules.")
    arguments = dict(options or {})
    takes = inspect.signature(factory).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    if top_k is not None:
        arguments["top_k"] = top_k
    if normalize_weights is not None:
        arguments["normalize_weights"] = normalize_weights
    if init_std is not None and ("init_std" in takes or anything):
        arguments.setdefault("init_std", init_std)
    unknown = [] if anything else [name for name in arguments if name not in takes]
    if unknown:
        given = getattr(factory, "__name__", router)
        known = [n for n in takes if n not in ("self", "d_model", "num_experts")]
        raise ConfigError(
            f"router={given} has no option {', '.join(unknown)}. Its options are:"
            f" {', '.join(known)}."
        )
    built = factory(d_model, num_experts, **arguments)
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"router={router!r} gave a {type(built).__name__}. It must give a torch.nn.Module."
        )
    return _own_router(built, None, num_experts, None, None)


def _own_router(
    router: nn.Module,
    options: Mapping[str, Any] | None,
    num_experts: int,
    top_k: int | None,
    normalize_weights: bool | None,
) -> nn.Module:
    if getattr(router, "num_experts", num_experts) != num_experts:
        raise ConfigError(
            f"The router chooses among {router.num_experts} experts, but the layer has"
            f" num_experts={num_experts}. Give both the same number."
        )
    if normalize_weights is not None:
        raise ConfigError(
            "normalize_weights is an option of the built-in routers, but router= is already a"
            " module. Drop the argument; the module decides."
        )
    if options:
        raise ConfigError(
            f"router_options={dict(options)} are for a router that the layer builds, but router= is"
            " already a module. Drop the argument."
        )
    own = getattr(router, "_top_k", None) if isinstance(router, Router) else None
    if top_k is not None and own is not None and own != top_k:
        raise ConfigError(
            f"The layer's top_k={top_k} differs from its router's top_k={own}. Drop the layer's."
        )
    return router


def _find(name: str) -> Callable[..., nn.Module]:
    if name in ROUTERS:
        return ROUTERS[name]
    return _import("router", name, f", or one of: {', '.join(ROUTERS)}")


def _import(argument: str, path: str, others: str = "") -> Callable[..., nn.Module]:
    """Imports ``package.module.Class``, the value of this argument."""
    wanted = (
        f"It must be a module, a class of modules, the path of one (package.module.Class){others}."
    )
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ConfigError(f"{argument}={path!r} is unknown. {wanted}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{argument}={path!r} is unknown: {error}. {wanted}") from error
    if not callable(found):
        raise ConfigError(
            f"{argument}={path!r} is a {type(found).__name__}, which can't be called. {wanted}"
        )
    return found  # type: ignore[no-any-return]


def resolve_num_experts(num_experts: int | None, expert: Any) -> int:
    """``num_experts``, or if it is None the length of a list of experts.

    Raises:
        ConfigError: if there is neither.
    """
    listed = isinstance(expert, Sequence | nn.ModuleList) and not isinstance(expert, str)
    found = len(expert) if num_experts is None and listed else num_experts
    check_sizes(num_experts=found)
    assert found is not None
    return found


def make_experts(
    expert: ExpertFactory | Sequence[nn.Module] | str | None,
    d_model: int,
    d_ffn: int | None,
    num_experts: int,
    local_ids: Iterable[int] | None,
    *,
    layer_seed: int,
    activation: str,
    bias: bool,
    init_std: float | None,
) -> Experts:
    """The local experts of a layer: stacked FFNs, or modules.

    Args:
        expert: what ``MoE(expert=...)`` takes; None for FFNs.
        d_model: D.
        d_ffn: F; None with modules that don't take it.
        num_experts: E of the whole model.
        local_ids: global ids of the experts to make; None for all.
        layer_seed: seeds each expert together with its global id.
        activation: the activation of FFNs.
        bias: whether FFNs have biases.
        init_std: standard deviation of FFNs' initial weights.

    Raises:
        ConfigError: if ``expert`` doesn't fit ``num_experts``, or ``d_ffn`` is missing.
    """
    if expert is not None:
        if isinstance(expert, str):
            expert = _import("expert", expert)
        if isinstance(expert, nn.Module) and not isinstance(expert, nn.ModuleList):
            raise ConfigError(
                f"expert= is one {type(expert).__name__}, but every expert needs weights of its"
                " own. Give its class, a function that returns a new module, or a list."
            )
        if not callable(expert) or isinstance(expert, nn.ModuleList):
            expert = list(expert)
            if len(expert) != num_experts:
                raise ConfigError(
                    f"expert= lists {len(expert)} modules, but num_experts={num_experts}. The list"
                    " holds all experts of the whole model."
                )
        sizes = (d_model,) if d_ffn is None else (d_model, d_ffn)
        return ModuleExperts(expert, sizes, num_experts, local_ids, layer_seed=layer_seed)
    assert d_ffn is not None
    return StackedExperts(
        d_model,
        d_ffn,
        num_experts,
        local_ids,
        layer_seed=layer_seed,
        activation=activation,
        bias=bias,
        init_std=init_std,
    )


def make_shared_expert(
    ffn: int | nn.Module | None, gate: bool, d_model: int, **options: Any
) -> SharedExpert | None:
    """The shared expert of a layer, if it has one.

    Raises:
        ConfigError: for a gate without an expert.
    """
    if ffn is not None:
        return SharedExpert(d_model, ffn, gate=gate, **options)
    if gate:
        raise ConfigError("shared_expert_gate=True without shared_expert: there is none to gate.")
    return None


def warn_if_not_causal(traits: RouterTraits, layer: str) -> None:
    """Warns if the router of a MoE layer in an autoregressive model sees later tokens."""
    if not traits.causal:
        warnings.warn(
            f"{layer}: {traits.name} is not causal: a token's experts depend on later tokens, so in"
            " training an autoregressive model sees what it must predict"
            " and does worse when it generates. Choose a router that treats each token alone.",
            CausalityWarning,
            stacklevel=3,
        )


def check_sizes(**sizes: Any) -> None:
    """Raises:
    ConfigError: if one is not an integer of at least 1.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} is invalid: it must be an integer of at least 1.")
