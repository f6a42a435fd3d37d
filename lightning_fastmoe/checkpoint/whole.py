"""Reads a whole checkpoint into memory, as the dictionary that a single-file checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.tensor_names import repeats_rows, split_name
from lightning_fastmoe.checkpoint.format.threads import thread_count

WEIGHTS_ONLY = (
    "If you trust the checkpoint's origin, pass weights_only=False, or allow their classes with"
    " torch.serialization.add_safe_globals([...]) before loading."
)
"""Advice for objects in checkpoints that are read where Lightning's ``weights_only`` decides."""


def read_whole(
    path: Path, *, trusted: bool = False, place: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, Any]:
    """Returns Lightning's checkpoint dictionary, with all weights and without optimizer states.

    The files that are read are compared with their hashes first.

    Args:
        path: the path of the directory.
        trusted: also unpickle arbitrary objects, which can run any code.
        place: moves a tensor to the wanted device.

    Returns:
        What Lightning and hooks saved, and ``"state_dict"`` with the names of the module's state
        dict: experts have their global ids, and tied weights share one tensor.

    Raises:
        CheckpointError: if it is damaged, or not trusted and holds more than plain data.
    """
    with CheckpointReader(path) as reader:
        reader.advice, reader.threads = WEIGHTS_ONLY, thread_count(1)
        # Only a resuming run needs these.
        skipped = ("optimizer_", "rank_")
        reader.verify(name for name in reader.manifest.files if not name.startswith(skipped))
        state = reader.read_state(trusted=trusted)
        weights: dict[str, Any] = {}
        for tensor in reader.manifest.tensors:
            kind, name = split_name(tensor)
            if kind is None and not repeats_rows(name):
                weights[name] = place(reader.read(tensor))
        for name, first in reader.manifest.tied.items():
            if first in weights:  # a frozen one may have been left out
                weights[name] = weights[first]
    return {**state["lightning"], "state_dict": weights | state["extra_state"]}
