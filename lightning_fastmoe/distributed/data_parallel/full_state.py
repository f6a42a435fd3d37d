"""State dicts of the whole model and its optimizer, from and to sharded experts.

Ranks other than the first send their experts one tensor at a time, so rank 0 needs memory of the
device for one tensor more, and of the host for the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_fastmoe.distributed.data_parallel.contents import Contents
from lightning_fastmoe.distributed.mesh import ExpertMesh
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.nn.experts.trained import TRAINED, TrainedExperts, trained_of
from lightning_fastmoe.nn.partial_state import expected_partial_state

Values = dict[tuple[str, ...], Any]
"""Path in a nested dictionary -> a tensor, or anything that pickle can copy."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor that is sent later."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def gather_model(contents: Contents, mesh: ExpertMesh | None) -> dict[str, Any]:
    """See :meth:`ExpertDataParallel.full_state_dict`."""
    with expected_partial_state():
        state = contents.model.state_dict()
    owners = {name: contents.expert_layer(name) for name in state}
    experts: Values = {(name,): state[name] for name, layer in owners.items() if layer is not None}
    _check_rows({path: (owners[path[0]], value) for path, value in experts.items()})
    whole = _gather_experts(contents, experts, mesh)
    if not _is_first(mesh):
        return {}
    dense = {name: _to_host(value) for name, value in state.items() if owners[name] is None}
    full = dense | {path[0]: value for path, value in whole.items()}
    return {name: full[name] for name in [*(n for n in state if n in full), *full]}


def load_model(contents: Contents, state: Mapping[str, Any], strict: bool) -> None:
    """See :meth:`ExpertDataParallel.load_full_state_dict`."""
    own = {
        name: _local_rows(name, value, contents.expert_layer(name)) for name, value in state.items()
    }
    contents.model.load_state_dict(own, strict=strict)


def gather_optimizer(
    contents: Contents, optimizer: Optimizer, mesh: ExpertMesh | None
) -> dict[str, Any]:
    """See :meth:`ExpertDataParallel.full_optimizer_state_dict`."""
    items = {id(item.tensor): item for item in contents.parameters}
    groups = _named_groups(contents, optimizer)
    dense: Values = {}
    experts: Values = {}
    for parameter, entries in optimizer.state.items():
        item = items[id(parameter)]
        part = _trained(item.name, contents.expert_layer(item.name))
        for key, value in entries.items():
            if part is not None and not part.rows and not _is_common(value):  # of padding
                value = value.new_empty(0, *part.shapes[item.name.rpartition(".")[2]])
            (experts if item.is_expert else dense)[item.name, key] = value
    _check_rows({path: (contents.expert_layer(path[0]), v) for path, v in experts.items()})
    whole = _gather_experts(contents, experts, mesh)
    names = _gather_objects([group["params"] for group in groups], mesh)
    if not _is_first(mesh):
        return {}
    state: dict[str, dict[str, Any]] = {}
    for (name, key), value in (dense | whole).items():
        state.setdefault(name, {})[key] = _to_host(value)
    for number, group in enumerate(groups):  # experts that are modules have names of their own
        group["params"] = list(dict.fromkeys(n for rank in names for n in rank[number]))
    trained = _trained_ids(contents)
    return {"state": state, "param_groups": groups} | (
        {"trained_experts": trained} if trained else {}
    )


def load_optimizer(contents: Contents, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """See :meth:`ExpertDataParallel.load_full_optimizer_state_dict`."""
    groups, saved = _named_groups(contents, optimizer), state["param_groups"]
    if len(groups) != len(saved):
        raise CheckpointError(
            f"The optimizer has {len(groups)} parameter groups, but the saved one had {len(saved)}."
            " Build it with the same groups."
        )
    saved_ids, ids = state.get("trained_experts", {}), _trained_ids(contents)
    if saved_ids != ids:
        raise CheckpointError(
            "The optimizer state was saved with another selection of SparseUpdate: trained experts"
            f" {saved_ids or 'as a whole'} there, {ids or 'as a whole'} here. Use the same"
            " experts=, or start with a new optimizer."
        )
    numbers: dict[str, int] = {}
    packed = []
    for number, (group, there) in enumerate(zip(groups, saved, strict=True)):
        known = set(there["params"])
        for name in group["params"]:
            if name not in known:
                raise CheckpointError(
                    f"{name} is in group {number} of the optimizer, but was not in that group when"
                    " it was saved. Build the optimizer with the same groups."
                )
            numbers[name] = len(numbers)
        packed.append({**there, "params": [numbers[name] for name in group["params"]]})
    entries = {
        numbers[name]: {
            key: _local_rows(name, value, contents.expert_layer(name))
            for key, value in values.items()
        }
        for name, values in state["state"].items()
        if name in numbers
    }
    optimizer.load_state_dict({"state": entries, "param_groups": packed})


def _named_groups(contents: Contents, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups with the names of their parameters."""
    names = {id(item.tensor): item.name for item in contents.parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"The optimizer has a parameter of shape {tuple(parameter.shape)} that is not"
                    " one of the wrapped model's, so its state has no name. Build the optimizer"
                    " from model.parameters()."
                )
    # torch's param_names would be those of this rank's experts only, also where they are loaded.
    return [
        {key: _to_host(value) for key, value in group.items() if key != "param_names"}
        | {"params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def _local_rows(name: str, value: Any, layer: ExpertLayer | None) -> Any:
    """What this rank's experts need of a value of the whole model."""
    if layer is None or not layer.experts.is_stacked or _is_common(value):
        return value
    rows = _rows(name, layer)
    if value.shape[0] != rows.total:
        raise CheckpointError(
            f"{name} has {value.shape[0]} rows in the loaded state, but the layer has"
            f" {rows.total} experts. Load the state of a whole model, which"
            " full_state_dict() returns, with as many experts."
        )
    if not rows.number:
        return value.new_zeros((1,) * value.dim())  # as the parameter is padding
    # A copy: an optimizer keeps it, and not the whole.
    return value[rows.first : rows.first + rows.number].clone()


class _Rows(NamedTuple):
    """This rank's rows of a parameter of the whole model."""

    first: int
    number: int
    total: int


def _rows(name: str, layer: ExpertLayer) -> _Rows:
    ids, part = layer.experts.local_ids, _trained(name, layer)
    if part is None:
        return _Rows(ids[0], len(ids), layer.num_experts)
    before = sum(i < ids[0] for i in part.expert_ids)
    return _Rows(before, len(part.rows), len(part.expert_ids))


def _trained(name: str, layer: ExpertLayer | None) -> TrainedExperts | None:
    """The trained experts whose slices a parameter holds; None if it is none of theirs."""
    if layer is None or f".{TRAINED}." not in name:
        return None
    return trained_of(layer.experts.holder)


def _trained_ids(contents: Contents) -> dict[str, list[int]]:
    """Names of the modules with the experts of which some are trained alone -> their ids."""
    named = contents.model.named_modules()
    return {
        name: list(module.expert_ids)
        for name, module in named
        if isinstance(module, TrainedExperts)
    }


def _is_common(value: Any) -> bool:
    """Whether a value says something of all of a layer's experts, such as a number of steps."""
    return not isinstance(value, Tensor) or value.dim() == 0


def _check_rows(values: Mapping[tuple[str, ...], tuple[ExpertLayer | None, Any]]) -> None:
    """Refuses what does not have a row for each expert: nobody could put it together again."""
    for path, (layer, value) in values.items():
        assert layer is not None
        if layer.experts.is_stacked and not _is_common(value):
            rows = _rows(path[0], layer).number
            if value.shape[0] != rows:
                raise CheckpointError(
                    f"{'/'.join(path)} has shape {tuple(value.shape)}, but this rank has {rows}"
                    " experts of the layer, and a row for each is needed to save them together."
                    " Use an optimizer whose states have the shapes of their parameters."
                )


def _gather_experts(contents: Contents, own: Values, mesh: ExpertMesh | None) -> Values:
    """The values of all experts, on the CPU of rank 0; an empty dictionary on the others.

    Rows of stacked experts, which have one name on every rank, are joined in the order of ranks.

    Raises:
        CheckpointError: on every rank, if one has no rows of them.
    """
    if mesh is None or mesh.ep_size == 1:
        return {path: _to_host(value) for path, value in own.items()} if _is_first(mesh) else {}
    sizes = {
        path: _Tensor(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v
        for path, v in own.items()
    }
    everyone = _gather_objects(sizes, mesh)
    _check_all_have_rows(contents, everyone)
    if dist.get_rank() >= mesh.ep_size:
        return {}  # rank 0's group has all experts
    if dist.get_rank() > 0:
        for value in own.values():
            if isinstance(value, Tensor) and value.numel():
                dist.send(_as_bytes(_on_device(value, mesh)), 0, mesh.ep_group)
        return {}
    parts: dict[tuple[str, ...], list[Any]] = {path: [_to_host(v)] for path, v in own.items()}
    for rank in range(1, mesh.ep_size):
        for path, found in everyone[rank].items():
            value = found
            if isinstance(found, _Tensor):
                device = mesh.device_mesh.device_type
                value = torch.empty(found.shape, dtype=found.dtype, device=device)
                if value.numel():
                    dist.recv(_as_bytes(value), rank, mesh.ep_group)
                value = _to_host(value)
            parts.setdefault(path, []).append(value)
    return {
        path: some[0] if len(some) == 1 or _is_common(some[0]) else torch.cat(some)
        for path, some in parts.items()
    }


def _check_all_have_rows(contents: Contents, everyone: list[Values]) -> None:
    """Every rank checks the same, before the first waits for what another doesn't send."""
    for path in dict.fromkeys(path for values in everyone for path in values):
        layer = contents.expert_layer(path[0])
        count = sum(path in values for values in everyone)
        # Other experts than stacked ones have names of their own, on one rank each.
        if layer is not None and layer.experts.is_stacked and count < len(everyone):
            raise CheckpointError(
                f"{'/'.join(path)} exists on {count} of {len(everyone)} ranks that hold the layer's"
                " experts. Give the optimizer the same parameters on every rank."
            )


def _gather_objects(own: Any, mesh: ExpertMesh | None) -> list[Any]:
    """The values of the ranks of this rank's expert parallel group."""
    if mesh is None or mesh.ep_size == 1:
        return [own]
    everyone: list[Any] = [None] * mesh.ep_size
    dist.all_gather_object(everyone, own, mesh.ep_group)
    return everyone


def _is_first(mesh: ExpertMesh | None) -> bool:
    return mesh is None or dist.get_rank() == 0


def _on_device(value: Tensor, mesh: ExpertMesh) -> Tensor:
    """On the device of the exchange: AdamW keeps its number of steps on the CPU."""
    return value.detach().to(mesh.device_mesh.device_type).contiguous()


def _as_bytes(value: Tensor) -> Tensor:
    return value.view(-1).view(torch.uint8)


def _to_host(value: Any) -> Any:
    """A copy on the CPU, which later steps don't change."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
