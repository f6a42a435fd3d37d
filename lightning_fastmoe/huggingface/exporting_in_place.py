"""Exports a model of transformers that was trained in place, whatever its family.

The checkpoint has transformers' own names. Its files are written by the model's own conversion in
reverse, which for most families gives each expert its own matrices. One stack of experts at a time
is in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.files import fsync_directory
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor, write_safetensors
from lightning_fastmoe.checkpoint.format.tensor_names import repeats_rows, weight_name
from lightning_fastmoe.checkpoint.tools.copying import read_parts, stored_tensor, target_dtype
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import LORA_A, LORA_B
from lightning_fastmoe.huggingface.exporting import COMPANIONS, split, write_index
from lightning_fastmoe.huggingface.lora import merged_weight

_SHOWN = 3


def export_in_place(
    reader: CheckpointReader,
    path: Path,
    config: Path,
    *,
    prefix: str | None = None,
    lora_scale: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes safetensors files, their index and ``config.json``, as ``save_pretrained`` would.

    Args:
        reader: the checkpoint; verify it first.
        path: the new directory, created atomically.
        config: the model's directory, from which the tokenizer is copied too, or its
            ``config.json``.
        prefix: prefix of the names of its weights in the checkpoint; None detects it.
        lora_scale: ``alpha / rank`` of the experts' adapters, which are merged; None if there are
            none.
        dtype: dtype to convert weights to; None keeps theirs.
        max_shard_bytes: maximum size of a file, unless it holds a single tensor.
        on_total: called once with the number of bytes that will be written.
        on_bytes: called with the number of bytes after each write.

    Returns:
        {"files": names, "tensors": number, "bytes": total}

    Raises:
        ConfigError: if the directory exists, or the weights don't match the model.
        OSError: if it can't be written.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already. Choose another name for the model.")
    model = _skeleton(config)
    shapes = _written_shapes(model)
    prefix = _find_prefix(reader, shapes) if prefix is None else prefix
    adapted = _check(reader, model, shapes, prefix, lora_scale)
    source = _Source(reader, model, prefix, adapted, lora_scale)
    tensors = list(_streams(source, shapes, dtype))
    total = sum(tensor.size for tensor in tensors)
    if on_total is not None:
        on_total(total)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.fastmoe-writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        shards = split(tensors, max_shard_bytes)
        for name, shard in shards.items():
            write_safetensors(temporary / name, shard, on_bytes)
        write_index(temporary, shards, total)
        _write_config(model, tensors, temporary)
        if config.is_dir():
            for name in COMPANIONS:
                if (config / name).is_file():
                    shutil.copyfile(config / name, temporary / name)
        written = sorted(os.listdir(temporary))
        fsync_directory(temporary)
        temporary.rename(path)
        fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {"files": written, "tensors": len(tensors), "bytes": total}


def _skeleton(config: Path) -> Any:
    """The model of a ``config.json``, without memory for its weights."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    try:
        about = transformers.AutoConfig.from_pretrained(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config} has no config.json of transformers: {error}") from error
    named = [getattr(transformers, name, None) for name in about.architectures or ()]
    kind: Any = next((one for one in named if one is not None), transformers.AutoModelForCausalLM)
    build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    with torch.device("meta"):
        model = build(about)
    # What save_pretrained would find out for each call; it leaves legacy names and prefixes out.
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [one for one in mapping if not isinstance(one, PrefixChange)]
    return model


def _written_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what ``save_pretrained`` writes: of tied weights the first."""
    tied = model.all_tied_weights_keys or {}
    ignored = set(model._keys_to_ignore_on_save or ())
    state = model.state_dict()
    return {n: tuple(t.shape) for n, t in state.items() if n not in tied and n not in ignored}


def _stored(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    start = weight_name("")
    found = reader.manifest.tensors.items()
    return {
        n.removeprefix(start): tuple(r.shape)
        for n, r in found
        if n.startswith(start) and not repeats_rows(n)
    }


def _find_prefix(reader: CheckpointReader, shapes: Mapping[str, Any]) -> str:
    """The only prefix with which all of the names are there."""
    stored = _stored(reader)
    first = next(iter(shapes))
    fitting = [
        prefix
        for prefix in (n.removesuffix(first) for n in stored if n.endswith(first))
        if (not prefix or prefix.endswith(".")) and all(prefix + n in stored for n in shapes)
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise ConfigError(
        f"{reader.path} has {len(fitting) or 'no'} models with all {len(shapes)} weights of the"
        f" config.json ({first}, ...). Check --config, or choose one with --prefix."
    )


def _check(
    reader: CheckpointReader,
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    lora_scale: float | None,
) -> set[str]:
    """Refuses a checkpoint of another model; returns the weights that have adapters."""
    stored = {n.removeprefix(prefix): s for n, s in _stored(reader).items() if n.startswith(prefix)}
    differ = [
        f"{prefix}{name} has shape {list(stored[name])}, not {list(shape)}"
        if name in stored
        else f"{prefix}{name} is missing"
        for name, shape in shapes.items()
        if stored.get(name) != shape
    ]
    adapters = {n for n in stored if n.endswith((LORA_A, LORA_B))}
    known = {*shapes, *adapters, *model.state_dict()}
    differ += [f"{prefix}{name} is not in that model" for name in stored if name not in known]
    if differ:
        more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise ConfigError(
            f"{reader.path} does not hold the model of the config.json:"
            f" {'; '.join(differ[:_SHOWN])}{more}. Check --config and --prefix."
        )
    if adapters and lora_scale is None:
        raise ConfigError(
            f"{reader.path} has adapters ({min(adapters)}, ...): pass --lora-scale, their alpha /"
            " rank, to merge them into the weights."
        )
    return {name.removesuffix(LORA_A) for name in adapters if name.endswith(LORA_A)}


@dataclass(frozen=True)
class _Source:
    """A checkpoint, the model that it holds, and which of its weights have adapters."""

    reader: CheckpointReader
    model: Any
    prefix: str
    adapted: set[str]
    scale: float | None

    def record(self, name: str) -> TensorRecord:
        """Of a weight of the model."""
        return self.reader.record(weight_name(self.prefix + name))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor."""
        record = self.record(name)
        flat = torch.empty(record.numel, dtype=dtype or DTYPES[record.dtype])
        at = 0
        for part in read_parts(self.reader, weight_name(self.prefix + name), dtype=flat.dtype):
            flat[at : at + part.numel()] = part
            at += part.numel()
        return flat.view(record.shape)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight of the model, with its adapter merged into it."""
        if name not in self.adapted:
            return self.read(name, dtype)
        assert self.scale is not None
        a, b = (self.read(f"{name}{part}") for part in (LORA_A, LORA_B))
        experts = self.model.get_submodule(name.rpartition(".")[0])
        weight = self.read(name)
        merged = merged_weight(weight, a, b, self.scale, transposed=experts.is_transposed)
        return merged.to(dtype)


def _streams(
    source: _Source, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> Iterator[StreamedTensor]:
    """The tensors of the files, in the order of the model's weights."""
    from transformers.core_model_loading import revert_weight_conversion

    for names, is_converted in _groups(source.model, shapes):
        records = {name: source.record(name) for name in names}
        like = {
            name: torch.empty(
                shapes[name], dtype=target_dtype(DTYPES[record.dtype], dtype), device="meta"
            )
            for name, record in records.items()
        }
        becomes = revert_weight_conversion(source.model, like)
        if not is_converted and not source.adapted & {*names}:
            ((name, record),), (key,) = records.items(), becomes
            stored = weight_name(source.prefix + name)
            yield stored_tensor(source.reader, stored, record, key, dtype)
            continue
        group = _Converted(partial(_convert, source, like), len(becomes))
        for key, tensor in becomes.items():
            yield StreamedTensor(key, tensor.dtype, tuple(tensor.shape), partial(group.take, key))


class _Converted:
    """Tensors that a conversion makes together; each is taken once.

    Args:
        make: makes them, by key in the files.
        count: their number.
    """

    def __init__(self, make: Callable[[], dict[str, Tensor]], count: int) -> None:
        self._make, self._left = make, count
        self._made: dict[str, Tensor] | None = None

    def take(self, key: str) -> Iterator[Tensor]:
        """The tensor's elements; the first call makes all, the last one frees them."""
        if self._made is None:
            self._made = self._make()
        tensor = self._made[key]
        self._left -= 1
        if not self._left:
            self._made = None
        yield tensor.contiguous().view(-1)


def _convert(source: _Source, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a group's weights and converts them."""
    from transformers.core_model_loading import revert_weight_conversion

    whole = {name: source.weight(name, meta.dtype) for name, meta in like.items()}
    converted: dict[str, Tensor] = revert_weight_conversion(source.model, whole)
    return converted


def _groups(model: Any, names: Iterable[str]) -> list[tuple[list[str], bool]]:
    """The names that transformers converts together, and whether it does more than rename them."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    back = [one.reverse_transform() for one in model._weight_conversions[::-1]]
    renamings = [one for one in back if isinstance(one, WeightRenaming)]
    converters = [one for one in back if isinstance(one, WeightConverter)]
    groups: dict[str, tuple[list[str], bool]] = {}
    for name in names:
        key, pattern = rename_source_key(name, renamings, converters, reverse=True)
        groups.setdefault(key, ([], pattern is not None))[0].append(name)
    return list(groups.values())


def _write_config(model: Any, tensors: Sequence[StreamedTensor], folder: Path) -> None:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    config = model.config
    config.dtype = max(sizes, key=lambda d: sizes[d])
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
