"""Reads checkpoints in single files: Lightning's, torch state dicts and safetensors."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPE_NAMES
from lightning_fastmoe.checkpoint.format.manifest import Topology
from lightning_fastmoe.checkpoint.format.pickles import check_archive
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.tensor_names import state_name, weight_name
from lightning_fastmoe.checkpoint.param_options import NamedGroup
from lightning_fastmoe.errors import CheckpointError

_NOT_STATE = ("state_dict", "optimizer_states")


def plain_name(key: str) -> str:
    """Removes the prefix of torch.compile's wrapper from a state dict key."""
    return key.replace("_orig_mod.", "")


class WholeTensors:
    """A source of whole tensors in memory or mapped from a file.

    Args:
        path: the path of the file, for messages.
        tensors: name in the canonical state -> tensor, preferably memory-mapped.
        state: values of the keys of ``state.json``.
    """

    topology: Topology | None = None
    excluded: tuple[str, ...] = ()
    tied: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any] | None = None
    ) -> None:
        self.path, self._tensors = path, tensors
        self._state = state or {}
        self.moe_layers: dict[str, int] = {}
        self._records = {name: self._record(name, t) for name, t in tensors.items()}

    def _record(self, name: str, tensor: Tensor) -> TensorRecord:
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{self.path}: {name!r} has the dtype {tensor.dtype}.")
        return TensorRecord(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), ())

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Name -> dtype and shape."""
        return self._records

    @property
    def contents(self) -> tuple[str, ...]:
        """What the checkpoint holds: "weights" and perhaps "optimizer"."""
        return ("weights", "optimizer") if self._state.get("optimizer") else ("weights",)

    def check(self, rank: int, world_size: int, contents: Iterable[str]) -> None:
        """Does nothing: such files have no hashes."""

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on."""
        stored = self._tensors[tensor]
        if out.dtype != stored.dtype and not (
            out.is_floating_point() and stored.is_floating_point()
        ):
            raise CheckpointError(
                f"{self.path}: {tensor!r} has dtype {stored.dtype}, but {out.dtype} is needed."
            )
        out.copy_(stored.detach().reshape(-1)[start : start + out.numel()])

    def read_state(self, *, trusted: bool = False) -> dict[str, Any]:
        """Everything that is not a tensor."""
        empty: dict[str, Any] = {
            "lightning": {},
            "optimizer": None,
            "engine": None,
            "extra_state": {},
        }
        return {**empty, **self._state}

    def read_rank_state(self, rank: int, *, trusted: bool = False) -> dict[str, Any] | None:
        """Always None: single files have no per-rank state."""
        return None


class SafetensorsFile(WholeTensors):
    """A safetensors file of whole tensors; only the needed rows are read.

    Args:
        path: the path of the file.

    Raises:
        CheckpointError: if it is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        self._keys: dict[str, str] = {}
        try:
            self._file = safe_open(str(path), framework="pt")
            for key in self._file.keys():  # noqa: SIM118  no mapping
                part = self._file.get_slice(key)
                record = TensorRecord(part.get_dtype(), tuple(part.get_shape()), ())
                name = weight_name(plain_name(key))
                self._records[name], self._keys[name] = record, key
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on; reads whole rows."""
        record = self._records[tensor]
        key = self._keys[tensor]
        part = self._file.get_slice(key)
        first = 0
        if record.shape and out.numel():
            row = math.prod(record.shape[1:])
            rows = slice(start // row, -(-(start + out.numel()) // row))
            values, first = part[rows], rows.start * row
        else:
            values = part[:] if record.shape else self._file.get_tensor(key)
        WholeTensors(self.path, {tensor: values}).read_into(tensor, start - first, out)


def open_file(
    path: Path, *, trusted: bool, user_groups: list[NamedGroup] | None = None
) -> WholeTensors:
    """Opens a single-file checkpoint: safetensors, a torch state dict, or Lightning's.

    Args:
        path: the path of the file.
        trusted: also unpickle arbitrary objects, which can run any code.
        user_groups: this run's optimizer groups as the user configured them; the optimizer states
            in the file refer to the parameters by their position in these groups.

    Raises:
        CheckpointError: if it is none of them, or not trusted and holds more than plain data.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    content = torch_load(path, trusted)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    if "state_dict" not in content:
        tensors = _tensors(path, content)
        return WholeTensors(path, tensors)
    tensors = _tensors(path, content["state_dict"])
    state: dict[str, Any] = {
        "lightning": {k: v for k, v in content.items() if k not in _NOT_STATE},
        "extra_state": {
            plain_name(k): v for k, v in content["state_dict"].items() if not isinstance(v, Tensor)
        },
    }
    optimizers = content.get("optimizer_states") or []
    if user_groups is not None and len(optimizers) == 1:
        states, info = _optimizer(path, optimizers[0], user_groups, tensors)
        tensors |= states
        state["optimizer"] = info
        state["engine"] = {
            "counters": {"global_steps": int(content.get("global_step", 0))},
            "loss_scaler": {},
        }
    return WholeTensors(path, tensors, state)


def torch_load(path: Path, trusted: bool) -> Any:
    """``torch.load`` on the CPU, mapped into memory where possible.

    Raises:
        CheckpointError: if the file is damaged, or not trusted and holds more than plain data or
            needs more memory than it has bytes.
    """
    if not trusted and zipfile.is_zipfile(path):
        with path.open("rb") as file:
            check_archive(file, path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=True)
        except RuntimeError:  # an older format, which can't be mapped
            return torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that are not plain data, or is damaged: {error} If you trust its"
            " origin, allow their classes with torch.serialization.add_safe_globals([...]), or use"
            " FastMoEStrategy(trust_checkpoints=True)."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def _tensors(path: Path, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {
        weight_name(plain_name(k)): v for k, v in state_dict.items() if isinstance(v, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors: it is not a model's state dict.")
    return tensors


def _optimizer(
    path: Path,
    saved: Mapping[str, Any],
    user_groups: list[NamedGroup],
    weights: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(optimizer state tensors, the ``optimizer`` entry of ``state.json``)."""
    names = [name for group in user_groups for name in group.params]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    if len(names) != len(indices):
        raise CheckpointError(
            f"{path} holds the optimizer state of {len(indices)} parameters, but here"
            f" configure_optimizers returned an optimizer with {len(names)}. Use the same optimizer"
            " groups to resume."
        )
    name_of = dict(zip(indices, names, strict=True))
    tensors: dict[str, Tensor] = {}
    scalars = []
    for index, state in saved["state"].items():
        name = name_of[index]
        shape = weights[weight_name(name)].shape
        single = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == shape:
                tensors[state_name(key, name)] = value
            elif isinstance(value, Tensor) and value.dim():
                raise CheckpointError(
                    f"{path}: the optimizer state {key!r} of {name!r} has the shape"
                    f" {list(value.shape)}, but the parameter has {list(shape)}."
                )
            else:
                single[key] = value
        scalars.append({"params": [name], "values": single})
    groups = [
        {
            "params": [name_of[index] for index in group["params"]],
            "options": {k: v for k, v in group.items() if k not in ("params", "name")},
        }
        for group in saved["param_groups"]
    ]
    return tensors, {"class": None, "groups": groups, "user_groups": groups, "scalars": scalars}
