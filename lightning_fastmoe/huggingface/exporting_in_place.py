"""Exports a model of transformers that was trained in place, whatever its family.

The checkpoint has transformers' own names. Its files are written by the model's own conversion in
reverse, which for most families gives each expert its own matrices. One stack of experts at a time
is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor
from lightning_fastmoe.checkpoint.format.tensor_names import weight_name
from lightning_fastmoe.checkpoint.tools.copying import read_parts, stored_tensor, target_dtype
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.exporting import stored_scales
from lightning_fastmoe.huggingface.model_directory import (
    main_dtype,
    refuse_existing,
    write_model_directory,
)
from lightning_fastmoe.huggingface.nf4 import dequantise, packed_bytes
from lightning_fastmoe.huggingface.stored_weights import StoredWeights
from lightning_fastmoe.nn.experts.lora import LORA_A, merged_weight

_SHOWN = 3


def export_in_place(
    reader: CheckpointReader,
    path: Path,
    config: Path,
    *,
    prefix: str | None = None,
    lora_scale: float | None = None,
    linear_scales: Mapping[str, float] | None = None,
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
        lora_scale: ``alpha / rank`` of the adapters, which are merged; None if there are none.
        linear_scales: the same of linear layers' adapters, by the layer's name; a layer that is
            not in it has ``lora_scale``.
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
    refuse_existing(path)
    model = _skeleton(config)
    shapes = _written_shapes(model)
    stored = StoredWeights.of(reader)
    prefix = _find_prefix(stored, reader, shapes) if prefix is None else prefix
    known = stored_scales(reader, lora_scale) if stored.adapters else {}
    source = _Source(reader, model, prefix, stored, lora_scale, linear_scales or {}, known)
    source.check(shapes)
    tensors = list(_streams(source, shapes, dtype))
    return write_model_directory(
        path,
        tensors,
        lambda folder: _write_config(model, tensors, folder),
        companions=config,
        max_shard_bytes=max_shard_bytes,
        on_total=on_total,
        on_bytes=on_bytes,
    )


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


def _find_prefix(stored: StoredWeights, reader: CheckpointReader, shapes: Mapping[str, Any]) -> str:
    """The only prefix with which all of the names are there."""
    first = next(iter(shapes))
    fitting = [
        prefix
        for prefix in (n.removesuffix(first) for n in stored.names if n.endswith(first))
        if (not prefix or prefix.endswith(".")) and all(prefix + n in stored.names for n in shapes)
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise ConfigError(
        f"{reader.path} has {len(fitting) or 'no'} models with all {len(shapes)} weights of the"
        f" config.json ({first}, ...). Check --config, or choose one with --prefix."
    )


@dataclass(frozen=True)
class _Source:
    """A checkpoint, the model that it holds, and how the adapters of its weights count."""

    reader: CheckpointReader
    model: Any
    prefix: str
    stored: StoredWeights
    scale: float | None
    linear_scales: Mapping[str, float]
    stored_scales: Mapping[str, float]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses a checkpoint of another model, and adapters of which nothing is known."""
        own = {
            n.removeprefix(self.prefix): s
            for n, s in self.stored.shapes.items()
            if n.startswith(self.prefix)
        }
        copies = [n for n in own if ".modules_to_save." in n or ".token_adapter." in n]
        if copies:
            raise ConfigError(
                f"{self.reader.path} has {len(copies)} weights that PEFT trains in copies"
                f" ({copies[0]}, ...), which can't be merged here. Load the checkpoint into the"
                " model on one device, and call merge_lora(model) and PEFT's merge_and_unload()."
            )
        differ = [
            f"{self.prefix}{name} has shape {list(own[name])}, not {list(shape)}"
            if name in own
            else f"{self.prefix}{name} is missing"
            for name, shape in shapes.items()
            if own.get(name) != self.stored_shape(name, shape)
        ]
        known = {*shapes, *self.model.state_dict()}
        adapted = [n for n in self.stored.adapters if n.startswith(self.prefix)]
        differ += [
            f"{self.prefix}{name} is not in that model"
            for name in (*own, *(n.removeprefix(self.prefix) for n in adapted))
            if name not in known
        ]
        if differ:
            more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
            raise ConfigError(
                f"{self.reader.path} does not hold the model of the config.json:"
                f" {'; '.join(differ[:_SHOWN])}{more}. Check --config and --prefix."
            )
        for name in adapted:
            if self.scale_of(name.removeprefix(self.prefix)) is None:
                raise ConfigError(
                    f"{self.reader.path} has adapters ({self.stored.adapters[name][0]}, ...): pass"
                    " --lora-scale, their alpha / rank, to merge them into the weights."
                )
            if name.removeprefix(self.prefix) not in shapes:
                raise ConfigError(
                    f"{self.reader.path} has an adapter of {name}, which is tied to another weight"
                    " and so not written: merged, it would be lost. Train without it, or save the"
                    " adapters with lightning_fastmoe.huggingface.save_adapters(trainer, path)."
                )
        guessed = [n for n in adapted if self.own_scale(n.removeprefix(self.prefix)) is None]
        ranks = {self.rank_of(n): n for n in guessed}
        kinds = {self.stored.adapters[n][0].endswith(LORA_A): n for n in guessed}
        if len(ranks) > 1 or len(kinds) > 1:
            what = f"of different ranks ({ranks})" if len(ranks) > 1 else f"of both kinds ({kinds})"
            raise ConfigError(
                f"{self.reader.path} has adapters {what}, whose alpha / rank --lora-scale may not"
                " all be, and doesn't say it. Use lightning_fastmoe.huggingface.save_pretrained("
                "trainer, path), which knows each."
            )
        for name in adapted if self.scale is not None and not self.linear_scales else ():
            trained = self.own_scale(name.removeprefix(self.prefix))
            if trained is not None and not math.isclose(trained, self.scale or 0.0):
                raise ConfigError(
                    f"--lora-scale {self.scale} is not the {trained} with which {self.reader.path}"
                    f" was trained, of {name}: leave it out."
                )

    def is_packed(self, name: str) -> bool:
        """Whether a weight of the model is in 4 bits."""
        return self.prefix + name in self.stored.packed

    def stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the checkpoint should have of a weight with that shape."""
        return (shape[0], packed_bytes(shape[1:])) if self.is_packed(name) else shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a weight of the model; those in 4 bits are written in bf16."""
        return torch.bfloat16 if self.is_packed(name) else DTYPES[self.record(name).dtype]

    def scale_of(self, name: str) -> float | None:
        """``alpha / rank`` of a weight's adapter; None if it is not known."""
        own = self.own_scale(name)
        return self.scale if own is None else own

    def own_scale(self, name: str) -> float | None:
        """The same, as the model or the checkpoint says it."""
        given = self.linear_scales.get(name.removesuffix(".weight"))
        if given is not None:
            return given
        return self.stored_scales.get(self.stored.adapters[self.prefix + name][0])

    def rank_of(self, stored: str) -> int:
        """The rank of the adapter of one of the checkpoint's weights."""
        a, _ = self.stored.adapters[stored]
        return self.reader.record(weight_name(a)).shape[-2]

    def is_adapted(self, name: str) -> bool:
        """Whether a weight of the model has an adapter."""
        return self.prefix + name in self.stored.adapters

    def stored_name(self, name: str) -> str:
        """The name of the checkpoint's tensor that is a weight of the model."""
        return weight_name(self.stored.names[self.prefix + name])

    def record(self, name: str) -> TensorRecord:
        """Of a weight of the model."""
        return self.reader.record(self.stored_name(name))

    def weight(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A weight of the model, with its adapter merged into it."""
        if not self.is_adapted(name):
            return self._base(name, shape, dtype)
        scale = self.scale_of(name)
        assert scale is not None
        a, b = (self._read(weight_name(n)) for n in self.stored.adapters[self.prefix + name])
        holder = self.model.get_submodule(name.rpartition(".")[0])
        weight = self._base(name, shape)
        transposed = getattr(holder, "is_transposed", False)
        return merged_weight(weight, a, b, scale, transposed=transposed).to(dtype)

    def _base(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A weight without its adapter; ``dtype`` None is its own, or fp32 if it is in 4 bits."""
        if not self.is_packed(name):
            return self._read(self.stored_name(name), dtype)
        tensors = [self._read(weight_name(n)) for n in self.stored.packed[self.prefix + name]]
        return dequantise(tensors, shape[1:], dtype or torch.float32)

    def _read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor of the checkpoint."""
        record = self.reader.record(name)
        flat = torch.empty(record.numel, dtype=dtype or DTYPES[record.dtype])
        at = 0
        for part in read_parts(self.reader, name, dtype=flat.dtype):
            flat[at : at + part.numel()] = part
            at += part.numel()
        return flat.view(record.shape)


def _streams(
    source: _Source, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> Iterator[StreamedTensor]:
    """The tensors of the files, in the order of the model's weights."""
    from transformers.core_model_loading import revert_weight_conversion

    for names, is_converted in _groups(source.model, shapes):
        like = {
            name: torch.empty(
                shapes[name], dtype=target_dtype(source.dtype(name), dtype), device="meta"
            )
            for name in names
        }
        becomes = revert_weight_conversion(source.model, like)
        made = any(source.is_adapted(name) or source.is_packed(name) for name in names)
        if not is_converted and not made:
            (name,), (key,) = names, becomes
            record = source.record(name)
            yield stored_tensor(source.reader, source.stored_name(name), record, key, dtype)
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

    whole = {name: source.weight(name, meta.shape, meta.dtype) for name, meta in like.items()}
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
    config = model.config
    config.dtype = main_dtype(tensors)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
