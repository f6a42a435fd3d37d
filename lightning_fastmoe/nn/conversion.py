"""Replaces parts of a model that exists, for example its FFNs by mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    places = list(_places(model, "", match, set()))
    if not places:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise ConfigError(
            f"convert: no module of the model matches. Its classes are {', '.join(kinds)}."
        )
    # All of them before the first takes its place: an error leaves the model as it was.
    new: dict[nn.Module, nn.Module] = {}
    for *_, old in places:
        if old not in new:
            new[old] = factory(old)
    for parent, child, _, old in places:
        parent._modules[child] = new[old]
    return {name: new[old] for *_, name, old in places}


def _places(
    parent: nn.Module, prefix: str, match: Callable[[str, nn.Module], bool], seen: set[nn.Module]
) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Parent, name in it, name in the model, and module, of each place with one that matches."""
    if parent in seen:
        return
    seen.add(parent)
    for child, module in parent._modules.items():
        if module is None:
            continue
        name = f"{prefix}{child}"
        if match(name, module):
            yield parent, child, name, module
        else:
            yield from _places(module, f"{name}.", match, seen)
