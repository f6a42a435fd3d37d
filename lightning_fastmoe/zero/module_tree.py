"""Notices modules that were put in the place of others after training was set up."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModuleTree:
    """The modules of a model, and where each of them is.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._known = {id(parameter) for parameter in root.parameters()}
        self._places: list[tuple[dict[str, Any], str, Any, str]] = [
            (module._modules, key, child, f"{name}.{key}" if name else key)
            for name, module in root.named_modules()
            for key, child in module._modules.items()
        ]

    def replaced(self) -> list[str]:
        """Complaints about modules with parameters of their own in the place of others.

        A wrapper around the former module, such as ``torch.compile``'s, is none.
        """
        found = []
        for i, (children, key, child, name) in enumerate(self._places):
            now = children.get(key)
            if now is child:
                continue
            new = [] if now is None else [p for p in now.parameters() if id(p) not in self._known]
            if new:
                found.append(
                    f"Module {name!r} was replaced by another one after training was set up, whose"
                    " parameters no optimizer trains. Write into the parameters of the former one,"
                    " or begin another fit."
                )
            else:
                self._places[i] = children, key, now, name
        return found
