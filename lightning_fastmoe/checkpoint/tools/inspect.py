"""Summarizes a checkpoint's contents, for display and for scripts."""

from __future__ import annotations

from typing import Any

from lightning_fastmoe.checkpoint.format.manifest import FORMAT_VERSION, Manifest
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.tensor_names import split_name


def summarize(reader: CheckpointReader, *, tensors: bool = False) -> dict[str, Any]:
    """Summarizes a checkpoint; reads only the manifest.

    Args:
        reader: the checkpoint.
        tensors: whether to list each tensor too.

    Returns:
        Values for ``json.dumps``; sizes are in bytes.
    """
    manifest = reader.manifest
    summary: dict[str, Any] = {
        "path": str(reader.path),
        "format_version": FORMAT_VERSION,
        "written_by": manifest.written_by,
        "contents": list(manifest.contents),
        **manifest.progress,
        "topology": dict(vars(manifest.topology)),
        "bytes": sum(file.size for file in manifest.files.values()),
        "weights": _weights(manifest),
        "optimizer": _optimizer(manifest),
        "moe_layers": [_layer(manifest, name) for name in manifest.moe_layers],
        "excluded": list(manifest.excluded),
        "tied": manifest.tied,
        "files": {name: manifest.files[name].size for name in sorted(manifest.files)},
    }
    if tensors:
        summary["tensors"] = {
            name: {**_about(record), "pieces": len(record.fragments)}
            for name, record in manifest.tensors.items()
        }
    return summary


def _about(record: TensorRecord) -> dict[str, Any]:
    return {"dtype": record.dtype, "shape": list(record.shape), "bytes": record.size}


def _weights(manifest: Manifest) -> dict[str, Any]:
    weights = [r for name, r in manifest.tensors.items() if split_name(name)[0] is None]
    return {
        "tensors": len(weights),
        "elements": sum(r.numel for r in weights),
        "bytes": sum(r.size for r in weights),
        "dtypes": sorted({r.dtype for r in weights}),
    }


def _optimizer(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Optimizer state -> dtype and numbers of tensors, elements and bytes."""
    states: dict[str, dict[str, Any]] = {}
    for name, record in manifest.tensors.items():
        state = split_name(name)[0]
        if state is not None:
            entry = states.setdefault(state, {"tensors": 0, "elements": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["elements"] += record.numel
            entry["bytes"] += record.size
    return states


def _layer(manifest: Manifest, layer: str) -> dict[str, Any]:
    """A layer's expert tensors by their names inside the layer: stacked, or for each module."""
    start = f"{layer}.experts."
    experts: dict[str, Any] = {}
    total = 0
    for tensor, record in manifest.tensors.items():
        state, name = split_name(tensor)
        if name.startswith(start):
            total += record.size
            if state is None:
                experts[name.removeprefix(start)] = _about(record)
    return {
        "name": layer,
        "num_experts": manifest.moe_layers[layer],
        "experts": experts,
        "modules": _modules(manifest.module_experts.get(layer, []), experts),
        "bytes_with_optimizer": total,
    }


def _modules(experts: list[list[str]], tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """Module experts, grouped by equal tensors; empty if the layer stacks its experts."""
    kinds: list[dict[str, Any]] = []
    for i, names in enumerate(experts):
        own = {name: tensors[full] for name in names if (full := f"{i}.{name}") in tensors}
        like = next((kind for kind in kinds if kind["tensors"] == own), None)
        if like is None:
            kinds.append({"ids": [i], "tensors": own})
        else:
            like["ids"].append(i)
    return kinds
