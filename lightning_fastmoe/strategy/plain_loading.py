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

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import torch_io
from pytorch_lightning.core import saving
from torch import Tensor

from lightning_fastmoe.checkpoint.publish import resolve
from lightning_fastmoe.checkpoint.reader import is_checkpoint
from lightning_fastmoe.checkpoint.whole import read_whole
from lightning_fastmoe.errors import CheckpointError

_NAME = "pl_load"
_MARK = "_loads_fastmoe_checkpoints"

Load = Callable[..., Any]


def register_loaders() -> None:
    """Lets Lightning's loaders know the directories of this package. Again is the same as once."""
    for module, function in ((saving, _read), (torch_io, _refuse)):
        former: Load = getattr(module, _NAME)
        if not hasattr(former, _MARK):
            setattr(module, _NAME, _for_directories(function, former))


def _for_directories(function: Load, former: Load) -> Load:
    @wraps(former)
    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str | Path) and is_checkpoint(resolve(Path(path))):
            return function(Path(path), *args, **kwargs)
        return former(path, *args, **kwargs)

    setattr(load, _MARK, True)
    return load


def _read(path: Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
    return read_whole(path, trusted=weights_only is False, place=_placer(map_location))


def _refuse(path: Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
    raise CheckpointError(
        f"{path} is a checkpoint of FastMoEStrategy, which other strategies can't read. Pass"
        " Trainer(strategy=FastMoEStrategy()), on one device, too; or write its weights into a"
        f" single file with `lightning-fastmoe checkpoint consolidate {path} model.ckpt`; or make a"
        " module of it with load_from_checkpoint."
    )


def _placer(map_location: Any) -> Callable[[Tensor], Tensor]:
    """Moves a tensor on the CPU as ``torch.load(map_location=...)`` would."""

    def place(tensor: Tensor) -> Tensor:
        if callable(map_location):
            storage = map_location(tensor.untyped_storage(), "cpu")
            return tensor if storage is None else tensor.to(storage.device)
        if isinstance(map_location, dict):
            return tensor.to(map_location.get("cpu", "cpu"))
        return tensor if map_location is None else tensor.to(torch.device(map_location))

    return place
