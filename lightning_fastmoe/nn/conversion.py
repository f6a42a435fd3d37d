"""Replaces parts of a model that exists, for example its FFNs by mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_fastmoe.errors import ConfigError


def convert(
    model: nn.Module,
    match: Callable[[str, nn.Module], bool],
    factory: Callable[[nn.Module], nn.Module],
) -> dict[str, nn.Module]:
    """Replaces each submodule that matches, in place.

    A module with several names is converted once and keeps them. Submodules of one that matches are
    not looked at.

    Args:
        model: the model.
        match: called with the name of a submodule and the submodule.
        factory: called with a submodule that matches; returns what takes its place.

    Returns:
        Name -> new module.

    Raises:
        ConfigError: if nothing matches, or the model itself does.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        >>> convert(model, lambda name, m: isinstance(m, nn.Tanh), lambda m: nn.ReLU())
        {'1': ReLU()}
    """
    if match("", model):
        raise ConfigError(
            "convert: the model itself matches, which can't be replaced in place. Use"
            " factory(model)."
        )
    found: dict[str, nn.Module] = {}
    new: dict[int, nn.Module] = {}
    _convert(model, "", match, factory, new, found)
    if not found:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise ConfigError(
            f"convert: no module of the model matches. Its classes are {', '.join(kinds)}."
        )
    return found


def _convert(
    parent: nn.Module,
    prefix: str,
    match: Callable[[str, nn.Module], bool],
    factory: Callable[[nn.Module], nn.Module],
    new: dict[int, nn.Module],
    found: dict[str, nn.Module],
) -> None:
    for child_name, child in list(parent._modules.items()):
        if child is None:
            continue
        name = f"{prefix}{child_name}"
        if id(child) in new or match(name, child):
            if id(child) not in new:
                new[id(child)] = factory(child)
            parent._modules[child_name] = found[name] = new[id(child)]
        else:
            _convert(child, f"{name}.", match, factory, new, found)
