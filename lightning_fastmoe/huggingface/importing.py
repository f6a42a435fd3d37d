"""Imports a transformers model as a checkpoint that training can start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_fastmoe import __version__
from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.manifest import Manifest, Topology
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.format.tensor_names import weight_name
from lightning_fastmoe.checkpoint.format.writer import write_checkpoint
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.huggingface.architecture import (
    Architecture,
    FileTensor,
    file_tensors,
    read_config,
    weight_shapes,
)
from lightning_fastmoe.huggingface.model_directory import INDEX, SINGLE

_IGNORED = ".rotary_emb.inv_freq"
"""Suffix of a constant that old versions of transformers stored."""

_PRECISION = {torch.bfloat16: "bf16-true", torch.float16: "16-true"}


def import_model(
    source: Path,
    path: Path,
    *,
    prefix: str = "network.",
    on_total: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Architecture:
    """Writes a Hugging Face model's weights, bit for bit, as a checkpoint with stacked experts.

    One tensor of the source is in memory at a time. The config is stored in the hyperparameters,
    where ``MoECausalLM.load_from_checkpoint`` and exporting find it.

    Args:
        source: a directory with ``config.json`` and safetensors files.
        path: the new checkpoint; an existing one is replaced.
        prefix: prefix of our names of weights: the attribute of the LightningModule that holds the
            decoder; "network." for ``MoECausalLM``.
        on_total: called once with the number of bytes that will be written.
        on_bytes: called with the number of bytes after each write.

    Returns:
        The model's architecture.

    Raises:
        ConfigError: if the model's family is unknown, or its weights don't match its config.
        CheckpointError: if a file is damaged; also as
            :class:`~lightning_fastmoe.checkpoint.format.publish.Publication` does.
        OSError: if it can't be written.
    """
    config = read_config(source)
    about = Architecture.from_config(config)
    with ExitStack() as stack:
        weights = _Weights(source, stack)
        weights.check(file_tensors(about))
        own: dict[str, list[FileTensor]] = {}
        for tensor in file_tensors(about):
            own.setdefault(tensor.name, []).append(tensor)
        fragments = [
            _fragment(weights, prefix + name, shape, own[name])
            for name, shape in weight_shapes(about).items()
        ]
        if on_total is not None:
            on_total(sum(fragment.length * fragment.dtype.itemsize for fragment in fragments))
        layers = [f"{prefix}model.layers.{i}.mlp" for i in about.moe_layers]
        precision = _PRECISION.get(fragments[0].dtype, "32-true")
        manifest = Manifest(
            written_by=f"lightning_fastmoe {__version__}",
            contents=("weights",),
            topology=Topology(1, 1, 0, precision),
            progress={"epoch": 0, "global_step": 0},
            moe_layers=dict.fromkeys(layers, about.num_experts),
        )
        write_checkpoint(path, manifest, fragments, _state(config), on_bytes)
    return about


def _fragment(
    weights: _Weights, name: str, shape: tuple[int, ...], parts: list[FileTensor]
) -> OwnedFragment:
    dtypes = {weights.dtype(part.key) for part in parts}
    if len(dtypes) > 1:
        raise ConfigError(
            f"{weights.source}: the parts of {name} have different dtypes,"
            f" {', '.join(sorted(map(str, dtypes)))}. Convert the model to a single dtype first."
        )

    def read() -> Iterator[Tensor]:
        for part in parts:
            yield weights.read(part.key)

    size = torch.Size(shape).numel()
    return OwnedFragment(
        0, size, tensor=weight_name(name), shape=shape, dtype=dtypes.pop(), parts=read
    )


class _Weights:
    """The safetensors files of a model."""

    def __init__(self, source: Path, stack: ExitStack) -> None:
        self.source = source
        self._files: dict[str, Any] = {}
        self._weight_map: dict[str, str] = {}  # tensor -> file, as in an index
        for name in _file_names(source):
            try:
                self._files[name] = stack.enter_context(safe_open(source / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{source / name} can't be read: {error}") from error
            for key in self._files[name].keys():  # noqa: SIM118 (it is not a dict)
                if key in self._weight_map:
                    raise CheckpointError(
                        f"{source}: {key} is in {self._weight_map[key]} and in {name}; remove"
                        " one of them."
                    )
                self._weight_map[key] = name

    def check(self, expected: list[FileTensor]) -> None:
        """Checks that the files have exactly the architecture's tensors, with their shapes.

        Raises:
            ConfigError: naming tensors that are missing, unknown, or of another shape.
        """
        shapes = {tensor.key: tensor.shape for tensor in expected}
        found = {key for key in self._weight_map if not key.endswith(_IGNORED)}
        for names, what in (
            (shapes.keys() - found, "lack"),
            (found - shapes.keys(), "also hold"),
        ):
            if names:
                some = sorted(names)
                more = f" and {len(some) - 3} more" if len(some) > 3 else ""
                raise ConfigError(
                    f"{self.source}: compared with the model in config.json, the files {what}"
                    f" {', '.join(some[:3])}{more}."
                )
        for key, shape in shapes.items():
            actual = tuple(self._slice(key).get_shape())
            if actual != shape:
                raise ConfigError(
                    f"{self.source / self._weight_map[key]}: {key} has shape {list(actual)}, but by"
                    f" config.json it must be {list(shape)}."
                )

    def _slice(self, key: str) -> Any:
        return self._files[self._weight_map[key]].get_slice(key)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor."""
        name = self._slice(key).get_dtype()
        if name not in DTYPES:
            raise ConfigError(f"{self.source}: {key} has dtype {name}, which is not supported.")
        return DTYPES[name]

    def read(self, key: str) -> Tensor:
        """Reads a tensor, flattened."""
        tensor: Tensor = self._files[self._weight_map[key]].get_tensor(key)
        return tensor.reshape(-1)


def _file_names(source: Path) -> list[str]:
    """The files with weights: those in the index, or the only one.

    Raises:
        ConfigError: if there are none, or the index names files outside the directory.
    """
    if not (source / INDEX).is_file():
        if (source / SINGLE).is_file():
            return [SINGLE]
        raise ConfigError(
            f"{source} has neither {INDEX} nor {SINGLE}. Weights in pickle files (.bin) are not"
            " read, because they can run code: save the model with transformers' save_pretrained"
            " first."
        )
    try:
        weight_map = json.loads((source / INDEX).read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{source / INDEX} is not an index of safetensors files: {error}"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{source / INDEX} names {name!r}, which is outside this directory.")
    return names


def _state(config: Mapping[str, Any]) -> dict[str, Any]:
    """The state.json of a run that has not started."""
    return {
        "lightning": {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": version("pytorch-lightning"),
            "loops": {},
            "hyper_parameters": {"config": dict(config)},
            "hparams_name": "kwargs",
        },
        "optimizer": None,
        "engine": None,
        "extra_state": {},
    }
