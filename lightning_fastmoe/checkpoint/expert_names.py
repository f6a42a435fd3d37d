"""Names of experts that are modules, each with its own parameters.

A rank knows the names of only the experts that it holds, so everything that refers to names (which
are excluded, which are tied, which options they have) is gathered from all ranks before saving.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_fastmoe.checkpoint.format.tensor_names import TRAINED_EXPERTS, repeats_rows
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.nn.experts.trained import trained_of

_EXPERTS = ".experts."

Rows = list[dict[str, Any]]


def expert_of(name: str, layers: Container[str]) -> tuple[str, int] | None:
    """Which module expert a parameter or buffer belongs to; the outermost if they are nested.

    Args:
        name: name in the state dict of the whole model.
        layers: names of layers whose experts are modules.

    Returns:
        ("moe", 5) for ``moe.experts.5.up.weight``; None if it belongs to no expert.
    """
    return next(_experts_of(name, layers), None)


def _experts_of(name: str, layers: Container[str]) -> Iterator[tuple[str, int]]:
    end = name.find(_EXPERTS)
    while end >= 0:
        if name[:end] in layers:
            first, dot, _ = name[end + len(_EXPERTS) :].partition(".")
            if dot and first.isascii() and first.isdigit() and str(int(first)) == first:
                yield name[:end], int(first)
        end = name.find(_EXPERTS, end + 1)


def why_not_saved(name: str, layer: ExpertLayer) -> str | None:
    """Why no checkpoint can hold a layer's sharded experts, or None if one can."""
    for path, module in layer.experts.named_modules():
        what = f"Expert {path.split('.')[0]} of layer {name!r}"
        # The same test as in state_dict().
        if getattr(type(module), "get_extra_state", None) is not nn.Module.get_extra_state:
            return (
                f"{what} has an extra state ({type(module).__name__}.get_extra_state), which"
                " checkpoints can't hold for experts that are sharded over ranks. Keep it in"
                " buffers, or keep all experts on each rank with MoE(dispatcher='local')."
            )
        if isinstance(module, MoE):
            return (
                f"{what} contains a MoE layer ({path!r}), which exists only on the ranks of that"
                " expert. Keep all experts of the outer layer on each rank with"
                " MoE(dispatcher='local')."
            )
    return None


def why_mistaken(module: nn.Module, layers: Mapping[str, ExpertLayer]) -> str | None:
    """Why a checkpoint would take weights for repeated rows, and so lose them; None if it won't."""
    parts = [trained_of(layer.experts.holder) for layer in layers.values()]
    repeated = {id(p) for part in parts if part is not None for p in part.parameters()}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if repeats_rows(name) and id(tensor) not in repeated:
            return (
                f"{name!r} has {TRAINED_EXPERTS!r} in its name, by which checkpoints know the"
                " experts that SparseUpdate trains, and would leave it out. Rename the module."
            )
    return None


@dataclass
class Inventory:
    """Description of the state that a rank holds: names and numbers, no tensors.

    Attributes:
        excluded: parameters that are not saved.
        tied: further name of a parameter -> its first.
        experts: layer whose experts are modules -> global id -> names inside the expert.
        groups: rows of parameter names and the options of their optimizer group.
        user_groups: the same for the groups that the user configured.
        scalars: rows of parameter names and their scalar optimizer states.
    """

    excluded: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    experts: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    groups: Rows = field(default_factory=list)
    user_groups: Rows = field(default_factory=list)
    scalars: Rows = field(default_factory=list)


def names_by_expert(
    names: Iterable[str], layers: Mapping[str, Iterable[int]]
) -> dict[str, dict[int, list[str]]]:
    """Groups names by the module expert that they belong to.

    Args:
        names: names of parameters and buffers.
        layers: name of a layer whose experts are modules -> ids that this rank holds.

    Returns:
        layer -> id -> names inside the expert; empty for an expert without parameters.
    """
    result = {layer: {i: list[str]() for i in ids} for layer, ids in layers.items()}
    for name in sorted(names):
        for layer, i in _experts_of(name, result):
            result[layer][i].append(name.removeprefix(f"{layer}{_EXPERTS}{i}."))
    return result


def merged(everyone: Sequence[Inventory], num_experts: Mapping[str, int]) -> Inventory:
    """Merges the inventories of all ranks.

    Args:
        everyone: one inventory per rank, or a single one that covers everything.
        num_experts: the number of experts of each layer.

    Raises:
        CheckpointError: if an expert is on no rank, or ranks disagree about one.
    """
    result = Inventory()
    excluded: set[str] = set()
    for rank, one in enumerate(everyone):
        excluded.update(one.excluded)
        result.tied |= one.tied
        for layer, experts in one.experts.items():
            whole = result.experts.setdefault(layer, {})
            for i, names in experts.items():
                if whole.setdefault(i, names) != names:
                    raise CheckpointError(
                        f"Ranks disagree about expert {i} of layer {layer!r}: {names} on rank"
                        f" {rank}, {whole[i]} on another. expert=... must build the same experts on"
                        " every rank."
                    )
    for layer, experts in result.experts.items():
        if lost := sorted(set(range(num_experts[layer])) - experts.keys()):
            raise CheckpointError(f"Expert {lost[0]} of layer {layer!r} is not on any rank.")
    result.excluded = sorted(excluded)
    result.groups = _merged_rows([one.groups for one in everyone])
    result.user_groups = _merged_rows([one.user_groups for one in everyone])
    result.scalars = _merged_rows([one.scalars for one in everyone])
    return result


def _merged_rows(everyone: Iterable[Rows]) -> Rows:
    """Rows that list each parameter once: the first rank's, then what only later ranks have."""
    result: Rows = []
    seen: set[str] = set()
    for rows in everyone:
        known = frozenset(seen)
        for row in rows:
            names = [name for name in row["params"] if name not in known]
            if names or not known:
                result.append({**row, "params": names})
                seen.update(names)
    return result


def check_expert_ids(
    saved: Iterable[str], layers: Mapping[str, int], own: Iterable[str], where: object
) -> None:
    """Refuses files of plain weights whose experts are not the model's.

    Args:
        saved: names of the weights in the file.
        layers: layer whose experts are modules -> its ``num_experts``.
        own: names of this rank's parameters.
        where: the file's path, for messages.

    Raises:
        CheckpointError: naming the layer and the expert.
    """
    there, here = _ids(saved, layers), _ids(own, layers)
    for layer, num_experts in layers.items():
        strange = [i for i in there[layer] if i >= num_experts]
        lost = sorted(here[layer] - there[layer]) if there[layer] else []
        if strange or lost:
            what = (
                f"an expert {max(strange)} in the file"
                if strange
                else f"no expert {lost[0]} in the file"
            )
            raise CheckpointError(
                f"{where}: layer {layer!r} has {what}, but here num_experts={num_experts}. Experts"
                " can't be added or dropped on loading: build the model with as many experts as"
                " the file holds."
            )


def _ids(names: Iterable[str], layers: Iterable[str]) -> dict[str, set[int]]:
    result = {layer: set[int]() for layer in layers}
    for name in names:
        if owner := expert_of(name, result):
            result[owner[0]].add(owner[1])
    return result
