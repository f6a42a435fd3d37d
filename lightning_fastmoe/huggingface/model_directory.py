"""A model's directory of safetensors files, as transformers and its users read it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_fastmoe.checkpoint.format.files import fsync_directory, write_small
from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor, write_safetensors
from lightning_fastmoe.errors import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files next to a model's weights that fine-tuning doesn't change."""


def write_model_directory(
    path: Path,
    tensors: Sequence[StreamedTensor],
    write_config: Callable[[Path], None],
    *,
    companions: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes the files and their index.

    Args:
        path: the new directory, created atomically.
        tensors: what the files hold, in this order.
        write_config: writes ``config.json`` into a directory.
        companions: the directory to copy the tokenizer from; ignored if it is a file.
        max_shard_bytes: maximum size of a file, unless it holds a single tensor.
        on_total: called once with the number of bytes that will be written.
        on_bytes: called with the number of bytes after each write.

    Returns:
        {"files": names, "tensors": number, "bytes": total}

    Raises:
        ConfigError: if the directory exists.
        OSError: if it can't be written.
    """
    total = sum(tensor.size for tensor in tensors)
    with new_directory(path) as folder:
        if on_total is not None:
            on_total(total)
        shards = _split(tensors, max_shard_bytes)
        for name, shard in shards.items():
            write_safetensors(folder / name, shard, on_bytes)
        if len(shards) > 1:
            weight_map = {t.key: name for name, shard in shards.items() for t in shard}
            write_json(
                folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        write_config(folder)
        if companions is not None:
            for name in COMPANIONS:
                if (companions / name).is_file():
                    shutil.copyfile(companions / name, folder / name)
        written = sorted(os.listdir(folder))
    return {"files": written, "tensors": len(tensors), "bytes": total}


def refuse_existing(path: Path) -> None:
    """Refuses a path at which there is anything, a dangling link included.

    Raises:
        ConfigError: naming the path.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already. Choose another name.")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which appears at ``path`` if the block ends without an error.

    Raises:
        ConfigError: if there is something at ``path``.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.fastmoe-writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync_directory(temporary)
        temporary.rename(path)
        fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main_dtype(tensors: Sequence[StreamedTensor]) -> torch.dtype:
    """The dtype of most bytes, which ``config.json`` names."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda d: sizes[d])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a small file of JSON, and waits for the disk."""
    write_small(path, (json.dumps(content, indent=2) + "\n").encode())


def _split(tensors: Sequence[StreamedTensor], limit: int) -> dict[str, list[StreamedTensor]]:
    """File name -> its tensors, filled in order up to the limit."""
    shards: list[list[StreamedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}
