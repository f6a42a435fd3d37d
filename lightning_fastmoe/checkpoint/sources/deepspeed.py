"""Reads the weights from DeepSpeed's checkpoints of models with its own MoE layers.

DeepSpeed writes one file with the dense weights and one for each (layer, expert), in the model's
compute dtype. The fp32 master copies and optimizer states are in flat partitions, which even
DeepSpeed can read only on the same number of ranks; they are not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.tensor_names import weight_name
from lightning_fastmoe.checkpoint.sources.single_file import (
    WholeTensors,
    plain_name,
    torch_load,
)
from lightning_fastmoe.errors import CheckpointError

_DENSE = "mp_rank_00_model_states.pt"
_EXPERT_FILE = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt")
_EXPERT_KEY = re.compile(r"(.+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
_GATE = ".deepspeed_moe.gate.wg.weight"
_ROLES = {
    "gate": ("gate_proj", "w1", "gate"),
    "up": ("up_proj", "w3", "up"),
    "down": ("down_proj", "w2", "down"),
}
_LIGHTNING = ("epoch", "global_step", "pytorch-lightning_version", "loops", "hyper_parameters")


def find_deepspeed(path: Path) -> Path | None:
    """The directory with DeepSpeed's files: ``path`` or a subdirectory; None if there are none."""
    candidates = [path, path / "checkpoint"]
    latest = path / "latest"
    if latest.is_file() and latest.stat().st_size < 1000:
        tag = latest.read_text(errors="replace").strip()
        if tag and "/" not in tag and tag not in (".", ".."):
            candidates.insert(0, path / tag)
    for directory in candidates:
        if directory.is_dir() and any(directory.glob("*mp_rank_*_model_states.pt")):
            return directory
    return None


def open_deepspeed(directory: Path, *, trusted: bool) -> WholeTensors:
    """Reads the weights.

    Args:
        directory: from :func:`find_deepspeed`.
        trusted: also unpickle arbitrary objects, which can run any code.

    Raises:
        CheckpointError: if weights are partitioned (ZeRO 3), experts are missing, or an expert is
            not a feed-forward network of two or three linear layers.
    """
    dense = directory / _DENSE
    if not dense.is_file():
        raise CheckpointError(
            f"{directory} has no {_DENSE}: its weights are partitioned by ZeRO 3 or by tensor"
            " parallelism. Convert it to a single file with DeepSpeed's zero_to_fp32.py, and load"
            " that."
        )
    content = torch_load(dense, trusted)
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict):
        raise CheckpointError(f"{dense} contains no weights: it was not written by DeepSpeed.")
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    weights: dict[str, Tensor] = {}
    for key, value in content["module"].items():
        _sort_in(plain_name(key), value, weights, experts)
    for file in sorted(directory.iterdir()):
        if _EXPERT_FILE.fullmatch(file.name):
            for key, value in torch_load(file, trusted).items():
                _sort_in(plain_name(key), value, weights, experts)
    for layer, found in experts.items():
        weights |= _stack(directory, layer, found)
    tensors = {weight_name(name): tensor for name, tensor in weights.items()}
    lightning = {key: content[key] for key in _LIGHTNING if key in content}
    source = WholeTensors(directory, tensors, {"lightning": lightning})
    source.moe_layers = {layer: len(found) for layer, found in experts.items()}
    return source


def _sort_in(
    key: str,
    value: Any,
    weights: dict[str, Tensor],
    experts: dict[str, dict[int, dict[str, Tensor]]],
) -> None:
    if not isinstance(value, Tensor):
        return
    if match := _EXPERT_KEY.fullmatch(key):
        layer, expert, name = match.groups()
        experts.setdefault(layer, {}).setdefault(int(expert), {})[name] = value
    elif key.endswith(_GATE):
        weights[key.removesuffix(_GATE) + ".router.weight"] = value
    else:
        weights[key] = value


def _stack(
    directory: Path, layer: str, experts: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Stacks a layer's experts by global id, with this package's names and shapes."""
    missing = sorted(set(range(max(experts) + 1)) - experts.keys())
    if missing:
        raise CheckpointError(
            f"{directory}: expert {missing[0]} of layer {layer!r} is not in any file."
        )
    parts = [_as_ours(directory, layer, experts[i]) for i in range(len(experts))]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise CheckpointError(
            f"{directory}: the experts of layer {layer!r} have different parameters."
        )
    return {
        f"{layer}.experts.{name}": torch.stack([part[name] for part in parts]) for name in parts[0]
    }


def _as_ours(directory: Path, layer: str, expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``up_proj``, ``down_proj`` and biases of one expert."""
    matrices = {n.removesuffix(".weight"): t for n, t in expert.items() if t.dim() == 2}
    roles = _roles(list(matrices))
    if roles is None or len(expert) not in (len(matrices), 2 * len(matrices)):
        raise CheckpointError(
            f"{directory}: the experts of layer {layer!r} consist of {', '.join(expert)}, which is"
            " not a feed-forward network of two linear layers, or of three named gate_proj, up_proj"
            " and down_proj (or w1, w3 and w2)."
        )
    *ups, down = roles
    result = {
        "up_proj": torch.cat([matrices[name] for name in ups]),
        "down_proj": matrices[down],
    }
    if len(expert) > len(matrices):
        result["up_bias"] = torch.cat([expert[f"{name}.bias"] for name in ups])
        result["down_bias"] = expert[f"{down}.bias"]
    return result


def _roles(names: list[str]) -> list[str] | None:
    """Names of (up, down) or (gate, up, down); two layers with unknown names count in order."""
    found = {
        role: name
        for name in names
        for role, known in _ROLES.items()
        if name.rpartition(".")[2] in known
    }
    if len(names) == 3 and len(found) == 3:
        return [found["gate"], found["up"], found["down"]]
    return names if len(names) == 2 else None
