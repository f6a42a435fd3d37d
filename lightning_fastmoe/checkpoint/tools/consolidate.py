"""Consolidates a checkpoint's weights into one file, for inference and other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_fastmoe.checkpoint.format.files import fsync_directory
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor, write_safetensors
from lightning_fastmoe.checkpoint.format.tensor_names import repeats_rows, split_name
from lightning_fastmoe.checkpoint.tools.copying import stored_tensor
from lightning_fastmoe.checkpoint.tools.torch_file import write_torch
from lightning_fastmoe.errors import ConfigError

SAFETENSORS, TORCH = "safetensors", "torch"

FORMATS = {".safetensors": SAFETENSORS, ".ckpt": TORCH, ".pt": TORCH, ".pth": TORCH}
"""File name suffix -> format."""

_KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    "datamodule_hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hparams_type",
)
"""The keys of Lightning's checkpoint dictionary that ``load_from_checkpoint`` needs."""


@dataclass(frozen=True)
class Consolidation:
    """Options of :func:`consolidate`: which weights to write, and in which dtype.

    Attributes:
        dtype: dtype that floating-point weights are converted to; None keeps the stored dtypes.
        prefix: prefix to remove from the names; weights without it are skipped. "" keeps all.
    """

    dtype: torch.dtype | None = None
    prefix: str = ""

    def tensors(self, reader: CheckpointReader) -> list[StreamedTensor]:
        """The weights, streamed from the checkpoint.

        Raises:
            ConfigError: if no weight has the prefix.
        """
        result = []
        for name, record in reader.manifest.tensors.items():
            state, weight = split_name(name)
            if state is None and weight.startswith(self.prefix) and not repeats_rows(weight):
                key = weight.removeprefix(self.prefix)
                result.append(stored_tensor(reader, name, record, key, self.dtype))
        if not result:
            raise ConfigError(
                f"{reader.path} has no weights whose names begin with {self.prefix!r}; `inspect"
                " --tensors` lists them."
            )
        return result

    def tied(self, reader: CheckpointReader) -> dict[str, str]:
        """Further name -> the stored name, both without the prefix."""
        pairs = reader.manifest.tied.items()
        return {
            name.removeprefix(self.prefix): first.removeprefix(self.prefix)
            for name, first in pairs
            if name.startswith(self.prefix) and first.startswith(self.prefix)
        }


def consolidate(
    reader: CheckpointReader,
    path: Path,
    file_format: str,
    options: Consolidation | None = None,
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Writes all weights into one file, which appears complete or not at all.

    A safetensors file has the tensors under the names of the module's ``state_dict()``, tied
    weights once. A torch file is a Lightning checkpoint without optimizer state, which
    ``torch.load(weights_only=True)`` and ``LightningModule.load_from_checkpoint`` can read. The
    weights are streamed through a few buffers of 4 MiB.

    Args:
        reader: the checkpoint; verify it first.
        path: the file to write.
        file_format: "safetensors" or "torch".
        options: which weights, in which dtype.
        overwrite: whether to replace an existing file.
        on_bytes: called with the number of bytes after each write.

    Raises:
        ConfigError: if the file exists, or no weight is selected.
        CheckpointError: if hyperparameters are not plain data.
        OSError: if it can't be written.
    """
    options = options or Consolidation()
    tensors = options.tensors(reader)
    with replacing(path, overwrite=overwrite) as temporary:
        if file_format == SAFETENSORS:
            write_safetensors(temporary, tensors, on_bytes)
        else:
            state = reader.read_state()
            rest = {key: value for key, value in state["lightning"].items() if key in _KEPT}
            extra = _extra_state(state, options.prefix)
            write_torch(temporary, tensors, options.tied(reader), rest, extra, on_bytes)


def _extra_state(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    named = state["extra_state"]
    return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Context manager: a temporary file name that is renamed to ``path`` on success.

    Raises:
        ConfigError: if ``path`` exists and must not be overwritten, or is a directory.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        mend = "it is a directory" if path.is_dir() else "pass --overwrite to replace it"
        raise ConfigError(f"{path} exists already: {mend}, or choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.fastmoe-writing")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
