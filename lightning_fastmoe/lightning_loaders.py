"""Teaches Lightning's own loaders to read this package's checkpoints, which are directories.

Users call ``MyModule.load_from_checkpoint("last.ckpt")`` on plain LightningModules: no code of this
package runs, and Lightning has no hook to register a loader. It opens the path with a function that
``pytorch_lightning.core.saving`` imports by name. That name, in that one module, is replaced by a
function that checks whether the path is a checkpoint of this package and otherwise calls the
original: nothing changes for other files, ``torch.load`` or other libraries. The name that
strategies for single files use is replaced too; there the function only raises an error with
instructions, because such a strategy may need the optimizer's state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_fastmoe.registration import when_imported

_NAME = "pl_load"
_MARK = "_loads_fastmoe_checkpoints"
_FUNCTIONS = {
    "pytorch_lightning.core.saving": "read",
    "lightning_fabric.plugins.io.torch_io": "refuse",
}
"""Module -> the function of ``plain_loading.py`` that replaces ``pl_load`` in it."""


def register_loaders(plain_loading: Callable[[], Any]) -> None:
    """Makes Lightning's loaders recognise this package's checkpoints. Idempotent.

    Args:
        plain_loading: imports ``strategy/checkpointing/plain_loading.py``; called when there is a
            path to check.
    """
    when_imported(
        {
            module: partial(_replace, function=function, plain_loading=plain_loading)
            for module, function in _FUNCTIONS.items()
        }
    )


def _replace(module: ModuleType, function: str, plain_loading: Callable[[], Any]) -> None:
    former: Callable[..., Any] = getattr(module, _NAME)
    if hasattr(former, _MARK):
        return

    @wraps(former)
    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str | Path) and not os.path.isfile(path):
            ours = plain_loading()
            if ours.is_ours(path):
                return getattr(ours, function)(Path(path), *args, **kwargs)
        return former(path, *args, **kwargs)

    setattr(load, _MARK, True)
    setattr(module, _NAME, load)
