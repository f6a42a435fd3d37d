"""Adapters in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

Adapters of linear layers, which PEFT has made, are stored as they are. A module of experts is
wrapped (PEFT 0.21) once for each of its parameters that have adapters; those of the first one are
under ``base_layer``. A is stored as (E * r, inputs), expert by expert; B as (outputs, r * E), in
which the expert changes fastest.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.tensor_names import weight_name
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import projections
from lightning_fastmoe.huggingface.lora import add_lora
from lightning_fastmoe.huggingface.model_directory import new_directory, write_json
from lightning_fastmoe.huggingface.packed_experts import stack_shape
from lightning_fastmoe.huggingface.peft_modules import (
    LinearAdapter,
    check_base_weights,
    check_initialisation,
    file_keys,
    linear_adapters,
    matches,
    target_modules,
    without_wrapper,
)
from lightning_fastmoe.huggingface.saving import (
    agree_on_new,
    lora_scale,
    on_rank_zero,
    save,
    the_model,
    warn_of_others,
)
from lightning_fastmoe.huggingface.sharded_experts import TransformersLayer, kind
from lightning_fastmoe.nn.experts.lora import LORA_A, LORA_B

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OTHERWISE = (
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"),
    *("layer_replication", "lora_dropout"),  # PEFT has no dropout of experts' adapters either
)
"""Options that must be unset."""
_PATTERNS = ("rank_pattern", "alpha_pattern")


def save_adapters(trainer: Any, path: Any, *, base_model: str | None = None) -> None:
    """Writes the adapters of experts and of linear layers as PEFT does; every rank calls this.

    Args:
        trainer: a Trainer with FastMoEStrategy, during or after ``fit``.
        path: the new directory.
        base_model: name or path of the model that they belong to, for ``adapter_config.json``.

    Raises:
        ConfigError: on all ranks, if the model has no adapters, parameters that are no adapters
            were trained too, linear layers have other adapters of PEFT than plain ones or their
            initialisation has changed the layers' weights, or ``path`` exists.
    """
    prefix, model = the_model(trainer)
    scale, linear = lora_scale(model), linear_adapters(model)
    if scale is None and not linear:
        raise ConfigError(
            "save_adapters: the model has no adapters; see add_lora, and PEFT's get_peft_model."
        )
    check_base_weights(model)
    theirs = file_keys(linear)
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in theirs and not name.endswith((LORA_A, LORA_B))
    ]
    if others:
        raise ConfigError(
            f"save_adapters would not save {len(others)} other trained parameters ({others[0]},"
            " ...). Use save_pretrained, which saves the whole model."
        )
    path = agree_on_new(trainer, "save_adapters", path)
    warn_of_others(trainer, "save_adapters", prefix, model)
    files = path.with_name(f".{path.name}.fastmoe-saved")
    save(trainer, files, exclude_frozen=True)

    def write() -> None:
        try:
            with CheckpointReader(files) as reader:
                _write(reader, model, prefix, scale, linear, path, base_model)
        finally:
            shutil.rmtree(files, ignore_errors=True)

    on_rank_zero(trainer, "save_adapters", write)


def _write(
    reader: CheckpointReader,
    model: Any,
    prefix: str,
    scale: float | None,
    linear: Mapping[str, LinearAdapter],
    path: Path,
    base_model: str | None,
) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    rank = 0
    for layer, adapted in kind.layers(model) if scale is not None else ():
        for number, name in enumerate(projections(adapted.module)):
            a, b = (
                _read(reader, f"{prefix}{layer}.experts.{name}{part}") for part in (LORA_A, LORA_B)
            )
            rank = a.shape[1]
            key = _PREFIX + f"{layer}.experts." + ("base_layer." if number == 0 else "")
            tensors[f"{key}lora_A.weight"] = a.flatten(0, 1).contiguous()
            tensors[f"{key}lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
            target = f"experts.{name}"
            if target not in targets:
                targets.append(target)
    for name, key in file_keys(linear).items():
        tensors[f"{_PREFIX}{key}"] = _read(reader, f"{prefix}{name}")
    modules = target_modules(model, linear)
    if scale is None:
        first = next(iter(modules.values()))
        rank, alpha = first.rank, first.alpha
    else:
        alpha = scale * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [*modules],
        "target_parameters": targets or None,
        "rank_pattern": {n: one.rank for n, one in modules.items() if one.rank != rank},
        "alpha_pattern": {n: one.alpha for n, one in modules.items() if one.alpha != alpha},
        "inference_mode": True,
    }
    with new_directory(path) as folder:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        write_json(folder / CONFIG, config)


def _read(reader: CheckpointReader, name: str) -> Tensor:
    record = reader.record(weight_name(name))
    flat = torch.empty(record.numel, dtype=DTYPES[record.dtype])
    reader.read_into(weight_name(name), 0, flat)
    return flat.view(record.shape)


@torch.no_grad()
def load_adapters(model: nn.Module, path: Any) -> None:
    """Gives a model's experts the adapters of PEFT's files, and freezes the rest.

    A rank that holds some of the experts reads all adapters and keeps those of its own. Adapters of
    linear layers must exist: apply PEFT's ``get_peft_model`` with the same target modules before.

    Args:
        model: has experts of transformers, with ``experts_implementation="fastmoe"``.
        path: the directory.

    Raises:
        ConfigError: before the model is changed, if the files have other adapters than those of all
            stacked experts and of the linear layers that have one, or of other shapes, or are
            computed otherwise; and as :func:`~lightning_fastmoe.huggingface.add_lora`.
    """
    from safetensors import safe_open

    path = Path(path)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        opened = safe_open(path / WEIGHTS, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} has no adapters of PEFT: {error}") from error
    _check_config(path, config)
    model = without_wrapper(model)
    check_base_weights(model)
    linear = linear_adapters(model)
    rank, alpha = config["r"], config["lora_alpha"]
    with opened as file:
        names = file.keys()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in names}
        theirs = _check_linear(path, shapes, model, config, linear)
        fits = _check_shapes(path, shapes, model, config, {*theirs})
        add_lora(model, rank, float(alpha))
        for key, (adapted, name) in fits.items():
            stored, number = file.get_tensor(key), adapted.num_experts
            whole = (
                stored.view(number, rank, -1)
                if name.endswith(LORA_A)
                else stored.view(stored.shape[0], rank, number).permute(2, 0, 1)
            )
            adapted.module.get_parameter(name).copy_(whole[list(adapted.experts.local_ids)])
        for key, name in theirs.items():
            model.get_parameter(name).copy_(file.get_tensor(key))


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuses what would make the same matrices compute something else."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"{path}: peft_type={config['peft_type']!r} is not supported: only LORA.")
    for option in _OTHERWISE:
        if config.get(option):
            raise ConfigError(f"{path}: {option}={config[option]!r} is not supported.")
    check_initialisation(path, config.get("init_lora_weights", True))
    for option in ("r", "lora_alpha"):
        if option not in config:
            raise ConfigError(f"{path}: {CONFIG} has no {option}.")


def _check_linear(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    config: Mapping[str, Any],
    linear: Mapping[str, LinearAdapter],
) -> dict[str, str]:
    """The file's name of each parameter of linear layers' adapters -> its name in the model."""
    found = {}
    for module, adapter in linear.items():
        rank, alpha = (
            patterns.get(matches(module, patterns), config[option])
            for option, patterns in zip(
                ("r", "lora_alpha"), (config.get(name) or {} for name in _PATTERNS), strict=True
            )
        )
        if rank != adapter.rank or not math.isclose(alpha, adapter.alpha):
            raise ConfigError(
                f"{path} has r={rank} and lora_alpha={alpha} for {module}, and the model"
                f" r={adapter.rank} and lora_alpha={adapter.alpha}."
            )
        for name, key in file_keys({module: adapter}).items():
            weight = model.get_parameter(name)
            size = tuple(getattr(weight, "ds_shape", weight.shape))
            if shapes.get(f"{_PREFIX}{key}") != size:
                raise ConfigError(
                    f"{path} has {shapes.get(_PREFIX + key, 'nothing')} for {_PREFIX}{key}, and the"
                    f" model's has shape {size}."
                )
            found[f"{_PREFIX}{key}"] = name
    return found


def _check_shapes(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    config: Mapping[str, Any],
    others: Set[str],
) -> dict[str, tuple[TransformersLayer, str]]:
    """The layer and the parameter of each of the file's tensors but ``others``."""
    rank = config["r"]
    fits: dict[str, tuple[TransformersLayer, str]] = {}
    for layer, adapted in kind.layers(model):
        experts: Any = adapted.module
        for index, name in enumerate(projections(experts)):
            for option in _PATTERNS:
                for module in (f"{layer}.experts", f"{layer}.experts.{name}"):
                    if (pattern := matches(module, config.get(option) or {})) is not None:
                        raise ConfigError(f"{path}: {option} of {pattern!r} is not supported.")
            shape = stack_shape(experts, name)
            inputs, outputs = shape[1:] if experts.is_transposed else shape[:0:-1]
            total = rank * adapted.num_experts
            start = _PREFIX + f"{layer}.experts." + ("base_layer." if index == 0 else "")
            for part, key, size in (
                (LORA_A, f"{start}lora_A.weight", (total, inputs)),
                (LORA_B, f"{start}lora_B.weight", (outputs, total)),
            ):
                if key not in shapes:
                    raise ConfigError(f"{path} has no {key}.")
                if shapes[key] != size:
                    raise ConfigError(
                        f"{path}: {key} has shape {shapes[key]}, not {size}, for r={rank} and the"
                        f" {adapted.num_experts} experts of {layer}."
                    )
                fits[key] = adapted, f"{name}{part}"
    if left := shapes.keys() - fits.keys() - others:
        raise ConfigError(
            f"{path} has {len(left)} adapters of layers that have none in the model ({min(left)},"
            " ...): apply PEFT's get_peft_model with these target_modules before."
        )
    return fits
