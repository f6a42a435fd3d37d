"""What the arguments of a MoE layer become, and which are refused."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.capacity import CapacityFactors, check_factor
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.module_experts import ExpertFactory, ModuleExperts
from lightning_fastmoe.nn.placement import Placement
from lightning_fastmoe.nn.router import ROUTERS, Router
from lightning_fastmoe.nn.router.base import LOSSES

DEFAULT_COEFFICIENTS = {
    "load_balancing": 0.01,
    "z_loss": 0.001,
    "importance": 0.1,
    "load": 0.1,
    "sequence_balancing": 0.0,
    "global_balancing": 0.0,
}
"""Coefficients of the losses that a router has switched on if the layer isn't told."""

RouterArgument = str | nn.Module | Callable[..., nn.Module]


class CausalityWarning(UserWarning):
    """A router that looks at later tokens stands in an autoregressive model."""


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
        ConfigError: if it is unknown or doesn't take what it is given.
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
            f"router={given} takes no {', '.join(unknown)}. Its options are: {', '.join(known)}."
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
            "normalize_weights is an option of the built-in routers, but router= is a module of"
            " its own. Drop the argument; the module decides."
        )
    if options:
        raise ConfigError(
            f"router_options={dict(options)} are for a router that the layer builds, but router= is"
            " a module already. Drop the argument."
        )
    own = getattr(router, "_top_k", None) if isinstance(router, Router) else None
    if top_k is not None and own is not None and own != top_k:
        raise ConfigError(
            f"top_k={top_k} of the layer differs from top_k={own} of its router. Drop the layer's."
        )
    return router


def _find(name: str) -> Callable[..., nn.Module]:
    if name in ROUTERS:
        return ROUTERS[name]
    return _import("router", name, f", or one of: {', '.join(ROUTERS)}")


def _import(argument: str, path: str, others: str = "") -> Callable[..., nn.Module]:
    """What stands at ``package.module.Class``, for an argument of this name."""
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
            f"{argument}={path!r} is a {type(found).__name__}, which is unknown here. {wanted}"
        )
    return found  # type: ignore[no-any-return]


def make_experts(
    expert: ExpertFactory | Sequence[nn.Module] | str | None,
    d_model: int,
    d_ffn: int | None,
    num_experts: int,
    placement: Placement | None,
    layer_seed: int,
    *,
    activation: str,
    bias: bool,
    init_std: float | None,
) -> Experts | ModuleExperts:
    """The local experts of a layer: stacked FFNs, or modules.

    Raises:
        ConfigError: if ``expert`` doesn't fit ``num_experts``, or ``d_ffn`` is missing.
    """
    first = placement.first_expert if placement else 0
    local = placement.num_local_experts if placement else num_experts
    place = {"first_expert": first, "num_local_experts": local, "layer_seed": layer_seed}
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
        return ModuleExperts(expert, sizes, num_experts, **place)
    assert d_ffn is not None
    return Experts(
        d_model, d_ffn, num_experts, **place, activation=activation, bias=bias, init_std=init_std
    )


def loss_coefficients(router: nn.Module, **given: float | None) -> dict[str, float]:
    """Each loss's coefficient: as given, else the default if the router has the loss switched on.

    Raises:
        ConfigError: for a coefficient that is negative or not finite, or a loss that means nothing
            to this router.
    """
    known: frozenset[str] = getattr(router, "losses", LOSSES)
    usual: frozenset[str] = getattr(router, "default_losses", Router.default_losses)
    coefficients = {}
    for name, value in given.items():
        if name not in DEFAULT_COEFFICIENTS:
            raise ConfigError(
                f"{name} is no loss of a MoE layer. They are: {', '.join(DEFAULT_COEFFICIENTS)}."
            )
        if value is None:
            value = DEFAULT_COEFFICIENTS[name] if name in usual else 0.0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"{name}={value!r} is invalid: a loss coefficient must be finite and at least 0"
                " (0 switches the loss off)."
            )
        if value > 0 and name not in known:
            raise ConfigError(
                f"{name}={value!r}, but this loss has no meaning for {type(router).__name__}."
                f" Its losses are: {', '.join(sorted(known)) or 'none'}."
            )
        coefficients[name] = value
    return coefficients


def capacity_factors(
    router: nn.Module, given: CapacityFactors | str
) -> tuple[float | None, float | None]:
    """The capacity factors in training and evaluation; "router" asks the router.

    Raises:
        ConfigError: if one is not positive, or the router has no use for it.
    """
    if isinstance(given, str):
        if given != "router":
            raise ConfigError(
                f"capacity_factor={given!r} is unknown: give a number, a pair (training,"
                " evaluation), None for dropless, or 'router' for the router's own."
            )
        usual: tuple[float | None, float | None]
        usual = getattr(router, "capacity_factors", (None, None))
        return usual
    pair = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(pair) != 2:
        raise ConfigError(
            f"capacity_factor={given!r} is invalid: a pair is (training, evaluation)."
        )
    train, evaluate = (check_factor("capacity_factor", value) for value in pair)
    check_takes_capacity(router, train)
    check_takes_capacity(router, evaluate)
    return train, evaluate


def check_takes_capacity(router: nn.Module, factor: float | None) -> None:
    """Refuses a factor that the router couldn't act on.

    Raises:
        ConfigError: for expert choice without a factor, or Soft MoE with one.
    """
    if not getattr(router, "own_capacity", False):
        return
    needs = getattr(router, "capacity_factors", (None, None))[0] is not None
    if needs != (factor is not None):
        raise ConfigError(
            f"capacity_factor={factor!r} doesn't suit {type(router).__name__}: "
            + (
                "its experts take that many times T/E tokens, so it must be a number."
                if needs
                else "it drops nothing and takes none. Drop the argument."
            )
        )


def warn_if_not_causal(layer: Any, name: str) -> None:
    """Warns if the router of a MoE layer in an autoregressive model sees later tokens."""
    if not getattr(layer.router, "causal", True):
        warnings.warn(
            f"{name}: {type(layer.router).__name__} is not causal: which expert a token meets"
            " depends on later tokens, so an autoregressive model learns from what it must predict"
            " and does worse when it generates. Choose a router that treats each token alone.",
            CausalityWarning,
            stacklevel=3,
        )


def check_sizes(**sizes: Any) -> None:
    """Raises:
    ConfigError: if one is no integer of at least 1.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} is invalid: it must be an integer of at least 1.")
