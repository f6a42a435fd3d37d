"""Lightning's own loaders, and checkpoints that are directories.

``MyModule.load_from_checkpoint("last.ckpt")`` is what people type, and their module is a plain
LightningModule: no method of ours is called, and Lightning has no place to register a loader. It
opens the path by a function that ``pytorch_lightning.core.saving`` imports by name. That name, in
that one module, is given a function which looks whether the path is a checkpoint of this package
and otherwise calls the former: nothing changes for other files, for ``torch.load`` or for other
libraries. So is the name by which strategies that know single files alone open them; there the
function can only say what to do, as such a strategy may want the optimizer's state.
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
"""Which function of ``strategy/plain_loading.py`` stands for ``pl_load`` in which module."""


def register_loaders(plain_loading: Callable[[], Any]) -> None:
    """Lets Lightning's loaders know the directories of this package. Again is the same as once.

    Args:
        plain_loading: imports ``strategy/plain_loading.py``, once there is a path to look at.
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
