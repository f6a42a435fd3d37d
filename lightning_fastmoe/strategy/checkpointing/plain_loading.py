"""Lets Lightning's own loaders read our checkpoints; see ``lightning_loaders.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.publish import resolve
from lightning_fastmoe.checkpoint.format.reader import is_checkpoint
from lightning_fastmoe.checkpoint.whole import read_whole
from lightning_fastmoe.errors import CheckpointError


def is_ours(path: str | Path) -> bool:
    """Whether a path is a checkpoint of this package."""
    return is_checkpoint(resolve(Path(path)))


def read(path: Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """What Lightning's single file would hold, without what only the strategy can restore."""
    return read_whole(path, trusted=weights_only is False, place=_placer(map_location))


def refuse(path: Path, map_location: Any = None, weights_only: bool | None = None) -> NoReturn:
    """Replaces the loader of strategies that read single files only.

    Raises:
        CheckpointError: always, naming the ways that work.
    """
    raise CheckpointError(
        f"{path} is a checkpoint of FastMoEStrategy, which this strategy can't read. Pass"
        " Trainer(strategy=FastMoEStrategy()), which also works on one device; or write its weights"
        f" to a single file with `lightning-fastmoe checkpoint consolidate {path} model.ckpt`; or"
        " load it into a module with load_from_checkpoint."
    )


def _placer(map_location: Any) -> Callable[[Tensor], Tensor]:
    """A function that moves CPU tensors as ``torch.load(map_location=...)`` would."""

    def place(tensor: Tensor) -> Tensor:
        if callable(map_location):
            storage = map_location(tensor.untyped_storage(), "cpu")
            return tensor if storage is None else tensor.to(storage.device)
        if isinstance(map_location, dict):
            return tensor.to(map_location.get("cpu", "cpu"))
        return tensor if map_location is None else tensor.to(torch.device(map_location))

    return place
