"""Exports a checkpoint as a directory that transformers can load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor
from lightning_fastmoe.checkpoint.format.tensor_names import repeats_rows, weight_name
from lightning_fastmoe.checkpoint.tools.copying import read_parts, target_dtype
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.huggingface.architecture import (
    CONFIG,
    Architecture,
    FileTensor,
    file_tensors,
    modernised,
    read_config,
    weight_shapes,
)
from lightning_fastmoe.huggingface.families import FAMILIES
from lightning_fastmoe.huggingface.model_directory import (
    main_dtype,
    refuse_existing,
    write_json,
    write_model_directory,
)
from lightning_fastmoe.nn.experts.lora import LORA_A, LORA_B, SCALES, merged_weight

ANCHOR = "model.embed_tokens.weight"
"""A weight of every model; what precedes its name is the prefix of all names."""

_NAMES_SHOWN = 3


def export(
    reader: CheckpointReader,
    path: Path,
    family: str,
    *,
    config: Path | None = None,
    prefix: str | None = None,
    lora_scale: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes sharded safetensors files, their index and ``config.json``.

    Args:
        reader: the checkpoint; verify it first.
        path: the new directory, created atomically.
        family: a key of :data:`FAMILIES`.
        config: ``config.json`` of a model with these sizes, or its directory, from which the
            tokenizer is copied too. None uses the ``config`` among the checkpoint's
            hyperparameters, where importing puts it.
        prefix: prefix of our names of weights; None detects it.
        lora_scale: ``alpha / rank`` of adapters, which are merged, if the checkpoint doesn't say
            it.
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
    content = read_config(config) if config is not None else kept_config(reader)
    if content.get("model_type") != family:
        raise ConfigError(
            f"The config.json has model_type={content.get('model_type')!r}, but the export is to"
            f" {family!r}. Choose the model's own family."
        )
    about = Architecture.from_config(content)
    prefix = find_prefix(reader) if prefix is None else prefix
    scales = check_weights(reader, about, prefix, lora_scale)
    refuse_existing(path)
    tensors = [_stream(reader, tensor, prefix, dtype, scales) for tensor in file_tensors(about)]
    return write_model_directory(
        path,
        tensors,
        lambda folder: write_json(folder / CONFIG, _finished(content, tensors)),
        companions=config,
        max_shard_bytes=max_shard_bytes,
        on_total=on_total,
        on_bytes=on_bytes,
    )


def find_prefix(reader: CheckpointReader) -> str:
    """The prefix of our names of weights, such as "network.".

    Raises:
        ConfigError: if there is no token embedding, or more than one.
    """
    ending = weight_name("")  # "weights/"
    names = [n.removeprefix(ending) for n in reader.manifest.tensors if n.startswith(ending)]
    found = [n.removesuffix(ANCHOR) for n in names if n == ANCHOR or n.endswith("." + ANCHOR)]
    if len(found) != 1:
        what = "no" if not found else "more than one"
        raise ConfigError(
            f"{reader.path} has {what} weight called PREFIX{ANCHOR}. Name the modules as"
            " transformers does (docs/huggingface.md), or choose one with --prefix."
        )
    return found[0]


def check_weights(
    reader: CheckpointReader, about: Architecture, prefix: str, lora_scale: float | None = None
) -> dict[str, float]:
    """Checks that the checkpoint has exactly the model's weights, with their shapes.

    Returns:
        Name of a weight that has an adapter -> ``alpha / rank``.

    Raises:
        ConfigError: naming weights that are missing, unknown, or of another shape, or adapters of
            which the scale is not known.
    """
    expected = {weight_name(prefix + n): s for n, s in weight_shapes(about).items()}
    start = weight_name(prefix)
    stored = reader.manifest.tensors.items()
    found = {n: r for n, r in stored if n.startswith(start) and not repeats_rows(n)}
    short = len(weight_name(""))
    scales: dict[str, float] = {}
    adapted = [n for n in found if n.endswith(LORA_A) and n.removesuffix(LORA_A) in expected]
    known = stored_scales(reader, lora_scale) if adapted else {}
    for name in adapted:
        weight = name.removesuffix(LORA_A)
        if f"{weight}{LORA_B}" not in found:
            continue
        scale = known.get(name[short:], lora_scale)
        if scale is None:
            raise ConfigError(
                f"{reader.path} has adapters ({name[short:]}, ...): pass --lora-scale, their"
                " alpha / rank, to merge them into the weights."
            )
        if lora_scale is not None and not math.isclose(scale, lora_scale):
            raise ConfigError(
                f"--lora-scale {lora_scale} is not the {scale} with which {reader.path} was"
                f" trained, of {weight[short:]}: leave it out."
            )
        scales[weight[len(start) :]] = scale
        del found[name], found[f"{weight}{LORA_B}"]
    differ = [
        f"{name[short:]} has shape {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    differ += [f"{name[short:]} is missing" for name in expected if name not in found]
    differ += [f"{name[short:]} is not in that model" for name in found if name not in expected]
    if differ:
        more = f"; and {len(differ) - _NAMES_SHOWN} more" if len(differ) > _NAMES_SHOWN else ""
        raise ConfigError(
            f"{reader.path} does not hold the {about.family} model of the config.json:"
            f" {'; '.join(differ[:_NAMES_SHOWN])}{more}. Check --config, --to and --prefix."
        )
    return scales


def stored_scales(reader: CheckpointReader, given: float | None) -> Mapping[str, float]:
    """``alpha / rank`` of the adapters that a checkpoint says it of, by the name of A.

    Args:
        reader: the checkpoint.
        given: what the user says; then the rest of the checkpoint's state may be unreadable.
    """
    try:
        found = reader.read_state()["lightning"].get(SCALES)
    except CheckpointError:  # it has objects of a class that is not trusted
        if given is None:
            raise
        return {}
    return found if isinstance(found, Mapping) else {}


def _stream(
    reader: CheckpointReader,
    tensor: FileTensor,
    prefix: str,
    dtype: torch.dtype | None,
    scales: Mapping[str, float],
) -> StreamedTensor:
    name = weight_name(prefix + tensor.name)
    target = target_dtype(DTYPES[reader.record(name).dtype], dtype)
    stop = tensor.start + torch.Size(tensor.shape).numel()
    scale = scales.get(tensor.name)
    if scale is not None:
        merged = partial(_merged, reader, name, tensor, scale, target)
        return StreamedTensor(tensor.key, target, tensor.shape, merged)
    return StreamedTensor(
        tensor.key,
        target,
        tensor.shape,
        lambda: read_parts(reader, name, tensor.start, stop, target),
    )


def _merged(
    reader: CheckpointReader, name: str, tensor: FileTensor, scale: float, target: torch.dtype
) -> Iterator[Tensor]:
    """Some rows of one expert's weight with their part of its adapter."""
    _, outputs, inputs = reader.record(name).shape
    expert, row = divmod(tensor.start // inputs, outputs)
    rows = tensor.shape[0]
    rank = reader.record(f"{name}{LORA_A}").shape[1]
    a = _slice(reader, f"{name}{LORA_A}", expert * rank * inputs, (rank, inputs))
    b = _slice(reader, f"{name}{LORA_B}", (expert * outputs + row) * rank, (rows, rank))
    weight = _slice(reader, name, tensor.start, (rows, inputs))
    yield merged_weight(weight, a, b, scale).to(target).view(-1)


def _slice(reader: CheckpointReader, name: str, start: int, shape: tuple[int, int]) -> Tensor:
    flat = torch.empty(shape[0] * shape[1], dtype=DTYPES[reader.record(name).dtype])
    reader.read_into(name, start, flat)
    return flat.view(shape)


def kept_config(reader: CheckpointReader) -> dict[str, Any]:
    """The config among a checkpoint's hyperparameters.

    Raises:
        ConfigError: if there is none.
    """
    kept = reader.read_state()["lightning"].get("hyper_parameters", {}).get("config")
    if not isinstance(kept, dict) or "model_type" not in kept:
        raise ConfigError(
            f"{reader.path} has no Hugging Face config among its hyperparameters. Pass --config"
            " with the config.json of a model with these sizes."
        )
    return kept


def _finished(config: Mapping[str, Any], tensors: list[StreamedTensor]) -> dict[str, Any]:
    """The config.json to write: the given one, with the model's class and dtype."""
    dtype = str(main_dtype(tensors)).removeprefix("torch.")
    family = FAMILIES[config["model_type"]]
    # transformers 5 renamed fields of transformers 4, which other programs still read. Unknown
    # fields are ignored, so the file has both names.
    both = {"dtype": dtype, "torch_dtype": dtype}
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        both["rope_theta"] = theta
    return {**modernised(config), "architectures": [family.architecture], **both}
