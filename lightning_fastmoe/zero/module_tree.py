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
        # With the parameters themselves: the number of one that is gone may be another's later.
        self._known = {id(parameter): parameter for parameter in root.parameters()}
        self._places: list[tuple[dict[str, Any], str, Any, str]] = [
            (module._modules, key, child, f"{name}.{key}" if name else key)
            for name, module in root.named_modules()
            for key, child in module._modules.items()
        ]

    def replaced(self) -> list[str]:
        """Complaints about modules in the place of others with new parameters to train.

        A wrapper around the former module, such as ``torch.compile``'s, has none.
        """
        found = []
        for i, (children, key, child, name) in enumerate(self._places):
            now = children.get(key)
            if now is child:
                continue
            new = [] if now is None else now.parameters()
            if any(p.requires_grad and id(p) not in self._known for p in new):
                found.append(
                    f"Module {name!r} was replaced by another one after training was set up, whose"
                    " parameters no optimizer trains. Write into the parameters of the former one,"
                    " or begin another fit."
                )
            else:
                self._places[i] = children, key, now, name
        return found
