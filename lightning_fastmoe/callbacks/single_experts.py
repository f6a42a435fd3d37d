"""Which single experts of which layers are trained: reads, checks and applies a selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.nn.experts.trained import dissolve, train_rows, trained_of
from lightning_fastmoe.zero.trained_experts import gathered, merge_trained

Selection = Mapping[str | int, Sequence[int]] | Sequence[int]
"""Layer's name, or index of its block -> ids of experts; or the ids for every layer."""


def check_selection(experts: Any) -> dict[str | int, list[int]] | list[int]:
    """A selection with its ids ascending, as plain data.

    Raises:
        ConfigError: if it is empty, or something else than names, indices and ids.
    """
    if isinstance(experts, Mapping):
        if not experts:
            raise ConfigError("experts={} selects nothing: name a layer, or use experts='none'.")
        for key in experts:
            if type(key) not in (str, int):
                raise ConfigError(f"experts has the key {key!r}: use layers' names or indices.")
        return {key: _ids(ids, f"experts[{key!r}]") for key, ids in experts.items()}
    return _ids(experts, "experts")


def _ids(ids: Any, what: str) -> list[int]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ConfigError(
            f"{what}={ids!r} is not supported: use 'all', 'none', a list of expert ids, or a"
            " mapping of layers to such lists."
        )
    if not ids:
        raise ConfigError(f"{what}=[] selects no expert: name some, or leave the layer out.")
    if any(type(i) is not int or i < 0 for i in ids) or len(set(ids)) < len(ids):
        raise ConfigError(f"{what}={list(ids)} must be different ids of experts, from 0 on.")
    return sorted(ids)


def resolve(
    module: nn.Module,
    experts: Mapping[str | int, list[int]] | list[int],
    blocks: str | None,
    prefix: set[int],
) -> dict[str, list[int]]:
    """The selection by layers' names.

    Args:
        module: has the layers.
        experts: from :func:`check_selection`.
        blocks: name of the list of blocks; needed for indices.
        prefix: ids of the parameters before the first trained block.

    Raises:
        ConfigError: if a layer or an expert doesn't exist, is frozen, or can't be trained in part.
    """
    layers = dict(expert_layers(module))
    frozen = [
        name
        for name, layer in layers.items()
        if any(id(p) in prefix for p in layer.experts.parameters())
    ]
    if not isinstance(experts, Mapping):
        experts = {name: experts for name in layers if name not in frozen}
    result: dict[str, list[int]] = {}
    for key, ids in experts.items():
        name = key if isinstance(key, str) else _layer_in(layers, blocks, key)
        if name not in layers:
            raise ConfigError(
                f"experts names the layer {name!r}, which does not exist. The layers are"
                f" {', '.join(map(repr, layers))}."
            )
        if name in result:
            raise ConfigError(f"experts names layer {name!r} twice, by name and index: drop one.")
        if name in frozen:
            raise ConfigError(
                f"experts names layer {name!r}, which is before the trained blocks: raise"
                " last_layers, or leave it out."
            )
        _check_layer(name, layers[name], ids)
        result[name] = ids
    return {name: result[name] for name in layers if name in result}


def _block_of(name: str, blocks: str | None) -> int | None:
    if blocks is None or not name.startswith(f"{blocks}."):
        return None
    return int(name.removeprefix(f"{blocks}.").split(".", 1)[0])


def _layer_in(layers: Mapping[str, ExpertLayer], blocks: str | None, index: int) -> str:
    found = [name for name in layers if _block_of(name, blocks) == index]
    if len(found) != 1:
        raise ConfigError(
            f"experts names block {index}, which has {len(found) or 'no'} MoE layers. The layers"
            f" are {', '.join(map(repr, layers))}."
        )
    return found[0]


def _check_layer(name: str, layer: ExpertLayer, ids: list[int]) -> None:
    if ids[-1] >= layer.num_experts:
        raise ConfigError(
            f"experts names expert {ids[-1]} of layer {name!r}, which has {layer.num_experts}: ids"
            f" are 0 to {layer.num_experts - 1}."
        )
    experts = layer.experts
    own = experts.holder.parameters(recurse=False)
    if stored := {str(p.dtype) for p in own if not p.is_floating_point()}:
        raise ConfigError(
            f"The experts of layer {name!r} are quantised ({', '.join(sorted(stored))}), so single"
            " ones can't be trained. Train adapters with add_lora(model, rank), or load the model"
            " without quantize_experts."
        )
    if not any(p.requires_grad for p in experts.parameters()):
        raise ConfigError(
            f"experts selects some of layer {name!r}, but all of them are frozen, perhaps by an"
            " earlier fit: call requires_grad_(True) on the model first, or leave the layer out."
        )
    if not experts.is_stacked:
        raise ConfigError(
            f"The experts of layer {name!r} are modules, of which SparseUpdate trains all or none:"
            " for single ones, call requires_grad_(False) of the others and leave out experts=."
        )
    known = set(experts.stack_names)
    others = {n for n, _ in experts.holder.named_parameters(recurse=False)} - known
    if others or any("_lora_" in n for n in known):
        raise ConfigError(
            f"The experts of layer {name!r} have adapters. Train adapters or single experts: leave"
            " out experts=, or call merge_lora(model) first."
        )


def apply_selection(module: nn.Module, selected: Mapping[str, list[int]]) -> None:
    """Makes parameters of the selected experts, and undoes an earlier selection.

    Every rank calls it: after a fit with ZeRO 3 the model is still partitioned.

    Args:
        module: has the layers.
        selected: layer's name -> ids; from :func:`resolve`.
    """
    for name, layer in expert_layers(module):
        experts, wanted = layer.experts, selected.get(name)
        before = trained_of(experts.holder)
        if before is not None and (wanted is None or list(before.expert_ids) != wanted):
            merge_trained([layer])
            dissolve(experts.holder)
            before = None
        if wanted is not None and before is None:
            guards = experts.refuse_others(
                "single experts that are trained", "call SparseUpdate.release(model)"
            )
            with gathered(experts.parameters()):
                held = experts.stack_names, experts.local_ids
                train_rows(experts.holder, *held, wanted, guards)
