"""Whether modules have hooks, also where ``torch.compile`` asks.

Dynamo doesn't guard modules' own dictionaries of hooks: what is registered once a graph exists
would never be called. It does guard what is read through an attribute of any other name.
"""

from __future__ import annotations

from torch import nn

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WATCHED = "watched_hooks"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its ``forward``."""
    return any(getattr(module, kind) for kind in _KINDS)


def watch_hooks(module: nn.Module) -> None:
    """Lets :func:`has_watched_hooks` find the hooks of a module, from now on.

    To be called again when the dictionaries themselves were replaced, by Lightning's
    ``remove_module_hooks`` for example.
    """
    setattr(module, _WATCHED, tuple(getattr(module, kind) for kind in _KINDS))


def watch_replaced_hooks(model: nn.Module) -> None:
    """Calls :func:`watch_hooks` for all modules inside ``model`` whose hooks are watched."""
    for module in model.modules():
        if hasattr(module, _WATCHED):
            watch_hooks(module)


def has_watched_hooks(module: nn.Module, *, backward: bool = True) -> bool:
    """As :func:`has_hooks`, where dynamo traces it: the graph is compiled again when hooks change.

    Args:
        module: one for which :func:`watch_hooks` was called.
        backward: whether those of the backward pass count.
    """
    found = False
    for hooks in getattr(module, _WATCHED)[: len(_KINDS) if backward else 2]:
        found = found or len(hooks) > 0  # dynamo guards a dict's length, but not its truth
    return found
