"""Checks that the parts of a manifest are consistent, for loading and for verifying.

A reader stops at the first fault and an audit lists them all; both use the same checks, so they
can't come to different verdicts. The time is linear in the size of the manifest, even a forged one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Set

from lightning_fastmoe.checkpoint.format.dtypes import itemsize
from lightning_fastmoe.checkpoint.format.manifest import STATE, Manifest
from lightning_fastmoe.checkpoint.format.records import TensorRecord, check_coverage, check_tensor
from lightning_fastmoe.checkpoint.format.tensor_names import (
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    split_name,
    weight_name,
)
from lightning_fastmoe.errors import CheckpointError

_EXPERTS = ".experts."
_LOCAL = f"{GRADIENTS}/local"


def check_manifest(manifest: Manifest, where: object) -> None:
    """Refuses a manifest that contradicts itself; no other file is read.

    Raises:
        CheckpointError: with the first of :func:`faults`.
    """
    for fault in faults(manifest, where):
        raise CheckpointError(fault)


def faults(manifest: Manifest, where: object) -> Iterator[str]:
    """All contradictions in a manifest, with the names of files and tensors."""
    proper: dict[str, TensorRecord] = {}
    for name, record in manifest.tensors.items():
        try:
            check_tensor(name, record.dtype, record.shape, where)
        except CheckpointError as error:
            yield str(error)
            continue
        proper[name] = record
        yield from _coverage_faults(name, record, manifest, where)
    yield from _file_faults(proper, manifest, where)
    for name, record in proper.items():
        yield from _state_faults(name, record, manifest, where)
    yield from _tied_faults(manifest, where)
    yield from _layer_faults(proper, manifest, where)


# ------------------------------------------------------------------------------------- one tensor


def _coverage_faults(
    name: str, record: TensorRecord, manifest: Manifest, where: object
) -> Iterator[str]:
    """Elements that are in no fragment or in two; for a stacked tensor, the experts concerned."""
    kind, parameter = split_name(name)
    layer, found, rest = parameter.rpartition(_EXPERTS)
    experts = manifest.moe_layers.get(layer) if found and "." not in rest else None
    is_local = kind == _LOCAL
    shape = record.shape[1:] if is_local else record.shape
    if experts is not None and shape:
        if shape[0] != experts:
            yield (
                f"{where}: tensor {name!r} has {shape[0]} experts, but layer {layer!r} has"
                f" num_experts={experts}."
            )
            return
        if record.numel and not is_local:
            hurt = list(_expert_faults(name, layer, experts, record, where))
            yield from hurt
            if hurt:
                return
    try:
        check_coverage(name, record, where)
    except CheckpointError as error:
        yield str(error)


def _expert_faults(
    name: str, layer: str, experts: int, record: TensorRecord, where: object
) -> Iterator[str]:
    size = record.numel // experts
    gaps, overlaps, position = [], [], 0
    for fragment in sorted(record.fragments):
        if fragment.start > position:
            gaps.append((position, min(fragment.start, record.numel)))
        elif fragment.start < position:
            overlaps.append((fragment.start, min(position, fragment.stop)))
        position = max(position, fragment.stop)
    if position < record.numel:
        gaps.append((position, record.numel))
    for ranges, what in ((gaps, "missing"), (overlaps, "duplicated")):
        for start, stop in ranges:
            if start < record.numel:
                first, last = start // size, max(start, min(stop, record.numel) - 1) // size
                which = f"expert {first} is" if first == last else f"experts {first} to {last} are"
                yield f"{where}: layer {layer!r}: {which} {what} in tensor {name!r}."


def _state_faults(
    name: str, record: TensorRecord, manifest: Manifest, where: object
) -> Iterator[str]:
    """Optimizer states and gradients without a parameter, or with another shape than it has."""
    kind, parameter = split_name(name)
    if kind is None:
        return
    if OPTIMIZER not in manifest.contents:
        yield f"{where}: tensor {name!r} is present, but contents is {list(manifest.contents)}."
        return
    weight = manifest.tensors.get(weight_name(parameter))
    if weight is None:
        yield (
            f"{where}: tensor {name!r} does not belong to any parameter: {parameter!r} does not"
            " exist."
        )
        return
    replicas, shape = 1, record.shape
    if kind == _LOCAL:
        replicas, shape = (record.shape or (0,))[0], record.shape[1:]
    if replicas < 1 or manifest.topology.world_size % replicas or shape != weight.shape:
        yield (
            f"{where}: tensor {name!r} has the shape {list(record.shape)}, which does not fit"
            f" parameter {parameter!r} of shape {list(weight.shape)} on"
            f" {manifest.topology.world_size} ranks."
        )


# -------------------------------------------------------------------------------------- all of them


def _file_faults(
    tensors: dict[str, TensorRecord], manifest: Manifest, where: object
) -> Iterator[str]:
    """Tensors in files that can't hold them, and required files that are missing."""
    data: dict[str, int] = {}
    strange: dict[str, str] = {}
    for name, record in tensors.items():
        # Loading without the optimizer verifies only the files that are named as weights.
        kind = f"{WEIGHTS if split_name(name)[0] is None else OPTIMIZER}_"
        for fragment in record.fragments:
            data[fragment.file] = data.get(fragment.file, 0) + fragment.length * itemsize(
                record.dtype
            )
            if not fragment.file.startswith(kind):
                strange.setdefault(fragment.file, name)
    for file, name in strange.items():
        yield f"{where}: tensor {name!r} is listed in {file}, which holds another kind of tensor."
    for file, size in data.items():
        if size > manifest.files[file].size:
            yield (
                f"{where}: {file} should hold {size} bytes of tensors, but has only"
                f" {manifest.files[file].size} in all."
            )
    if STATE not in manifest.files:
        yield f"{where} does not list {STATE}, which every checkpoint has."


def _tied_faults(manifest: Manifest, where: object) -> Iterator[str]:
    excluded = set(manifest.excluded)
    for name, first in manifest.tied.items():
        if weight_name(first) not in manifest.tensors and first not in excluded:
            yield f"{where}: {name!r} is listed as stored under {first!r}, which is missing."
        if weight_name(name) in manifest.tensors:
            yield (
                f"{where}: {name!r} is listed as stored under {first!r}, but is also stored itself."
            )


def _layer_faults(
    tensors: dict[str, TensorRecord], manifest: Manifest, where: object
) -> Iterator[str]:
    """Experts with missing tensors, and tensors that belong to no expert."""
    start = f"{WEIGHTS}/"
    weights = {name.removeprefix(start) for name in tensors if name.startswith(start)}
    known = weights | manifest.tied.keys() | set(manifest.excluded)
    inside = _names_inside(known, manifest)
    for layer, experts in manifest.module_experts.items():
        if manifest.moe_layers.get(layer) != len(experts):
            yield (
                f"{where}: module_experts lists {len(experts)} experts of layer {layer!r},"
                f" which has num_experts={manifest.moe_layers.get(layer)}."
            )
            continue
        listed = set()
        for i, names in enumerate(experts):
            full = [f"{layer}{_EXPERTS}{i}.{name}" for name in names]
            listed.update(full)
            if lost := [name for name in full if name not in known]:
                yield (
                    f"{where}: layer {layer!r}: expert {i} is missing: {', '.join(lost[:4])}"
                    f"{f' and {len(lost) - 4} more' if len(lost) > 4 else ''} not in any file."
                )
        for name in sorted(set(inside.get(layer, ())) - listed):
            yield f"{where}: tensor {name!r} does not belong to any expert of layer {layer!r}."
    for layer, number in manifest.moe_layers.items():
        # Module experts may have no parameters at all; what they have is listed.
        if layer not in inside and layer not in manifest.module_experts:
            yield f"{where}: layer {layer!r}: none of its {number} experts is in the checkpoint."
    for layer in unlisted_layers(known - manifest.tied.keys(), manifest.moe_layers):
        yield f"{where}: moe_layers does not list layer {layer!r}, whose experts are present."


def unlisted_layers(names: Set[str], listed: Container[str]) -> list[str]:
    """Layers that look like ``MoE`` by their names (a router, stacked experts) but are not listed.

    Args:
        names: the names of all parameters, of shared ones the first.
        listed: names of the model's MoE layers.
    """
    routers = {name.rpartition(".router.")[0] for name in names if ".router." in name}
    stacked = f"{_EXPERTS}up_proj"
    found = {name.removesuffix(stacked) for name in names if name.endswith(stacked)}
    return sorted(
        layer
        for layer in found & routers
        if layer not in listed and f"{layer}{_EXPERTS}down_proj" in names
    )


def _names_inside(known: set[str], manifest: Manifest) -> dict[str, list[str]]:
    """MoE layer -> names of its experts' tensors, including those of MoE layers nested in them."""
    layers = manifest.moe_layers.keys() | manifest.module_experts.keys()
    lengths = {len(layer) for layer in layers}
    inside: dict[str, list[str]] = {}
    for name in known:
        end = name.find(_EXPERTS)
        while end >= 0:
            if end in lengths and (layer := name[:end]) in layers:
                inside.setdefault(layer, []).append(name)
            end = name.find(_EXPERTS, end + 1)
    return inside
