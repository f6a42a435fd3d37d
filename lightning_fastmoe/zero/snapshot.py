"""Collects the state that a rank will write: its engine's, by parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.checkpoint.expert_names import Inventory, expert_of, merged
from lightning_fastmoe.checkpoint.format.manifest import Manifest, Topology
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.format.state_files import COUNTS
from lightning_fastmoe.checkpoint.format.tensor_names import repeats_rows, state_name, weight_name
from lightning_fastmoe.checkpoint.format.writer import (
    pack_rank_state,
    pack_state,
)
from lightning_fastmoe.checkpoint.lockstep import Together
from lightning_fastmoe.checkpoint.model_map import ModelMap, ParameterFragment, map_model
from lightning_fastmoe.checkpoint.param_options import NamedGroup, options_of
from lightning_fastmoe.checkpoint.random_state import random_state
from lightning_fastmoe.checkpoint.save import Snapshot, loaders_of, warn_of_objects
from lightning_fastmoe.checkpoint.step_counts import counts_of
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.zero.averages import Averages, training_name
from lightning_fastmoe.zero.gradients import PartialGradients
from lightning_fastmoe.zero.optimizer_state import elementwise, shared_scalars
from lightning_fastmoe.zero.state import ZeroShard, ZeroState
from lightning_fastmoe.zero.trained_experts import merge_trained

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

_NOT_STATE = ("state_dict", "optimizer_states")
_EVALUATED = (
    "This checkpoint has weights alone, in the precision that they were evaluated in: after"
    " Trainer.validate, test or predict there is no optimizer any more, and no fp32 weights where"
    " training was in mixed precision. Save it before, or use a checkpoint of the training."
)


def take_snapshot(
    together: Together,
    *,
    engine: Any,
    layers: Mapping[str, ExpertLayer],
    topology: Topology,
    client_state: dict[str, Any],
    user_groups: list[NamedGroup] | None,
    exclude_frozen: bool = False,
    averages: Averages | None = None,
) -> Snapshot:
    """Collects the tensors that this rank owns, without copying. Every rank calls this.

    Args:
        together: synchronises the ranks, which exchange names where these differ.
        engine: the DeepSpeed engine.
        layers: name -> MoE layer.
        topology: the topology of this run.
        client_state: Lightning's checkpoint dictionary.
        user_groups: the optimizer's groups as the user wrote them, or None.
        exclude_frozen: leave out frozen parameters; on loading, the model must have them already.
        averages: the averages of a run that averages its weights; saved as the weights.

    Raises:
        CheckpointError: on all ranks, if some state can't be saved.
    """
    merge_trained(layers.values())
    with together.stage():
        model = map_model(engine.module, layers)
        zero = ZeroState(engine, model.names)
        # Lightning omits the optimizer states when only weights are saved.
        with_optimizer = "optimizer_states" in client_state and zero.trains
        excluded = model.frozen() if exclude_frozen else set()
        shard = zero.shard()
        weights, buffers = shard, model.buffers
        training, training_buffers = weights, buffers
        if averages is not None:
            kept = {name: averages.buffers[name] for name in model.buffers}  # the persistent ones
            beside = (averages.beside(shard), kept)
            if averages.swapped:
                training, training_buffers = beside
            else:
                weights, buffers = beside
        fragments = list(_weights(model, weights, excluded, weight_name))
        if with_optimizer:
            fragments += _optimizer(model, shard)
            if averages is not None:
                fragments += _weights(model, training, excluded, training_name)
                fragments += _replicated(model, training_buffers, topology, training_name)
            if engine.mid_accumulation:
                fragments += PartialGradients(zero, model, shard).fragments()
        else:  # stacks hold the trained experts, too, which a model without them can read
            fragments = [f for f in fragments if not repeats_rows(f.tensor)]
        extra = {k: v for k, v in model.extra().items() if isinstance(v, Tensor)}
        fragments += _replicated(model, {**buffers, **extra}, topology, weight_name)
        local = {"rng": random_state(engine.device), "loaders": loaders_of(client_state)}
        if with_optimizer:
            local[COUNTS] = counts_of(layers)
        snapshot = Snapshot(fragments, pack_rank_state(together.rank, local))
        inventory = Inventory(sorted(excluded), model.tied, model.names_by_expert())
        if with_optimizer:
            inventory.groups = _rows(NamedGroup(f.names, options_of(f.group)) for f in shard.flats)
            inventory.user_groups = _rows(user_groups or [])
            inventory.scalars = shared_scalars(shard.flats)
    everyone = together.gather(inventory) if model.sharded_modules else [inventory]
    with together.stage():
        if together.rank == 0:
            whole = merged(everyone, model.num_experts)
            lightning = {k: v for k, v in client_state.items() if k not in _NOT_STATE}
            state = {
                "lightning": lightning,
                "optimizer": _optimizer_info(whole, zero, model) if with_optimizer else None,
                "engine": _engine_info(engine, zero) if with_optimizer else None,
                "extra_state": {
                    k: v for k, v in model.extra().items() if not isinstance(v, Tensor)
                },
            }
            snapshot.small |= pack_state(state)
            warn_of_objects(snapshot.small)
            if client_state.get("optimizer_states") and not zero.trains:
                warnings.warn(_EVALUATED, stacklevel=2)
            snapshot.manifest = Manifest(
                written_by=f"lightning_fastmoe {_version()}",
                contents=("weights", "optimizer") if with_optimizer else ("weights",),
                topology=topology,
                progress={k: int(client_state.get(k, 0)) for k in ("epoch", "global_step")},
                moe_layers=model.num_experts,
                module_experts={
                    layer: [experts[i] for i in sorted(experts)]
                    for layer, experts in whole.experts.items()
                },
                excluded=tuple(whole.excluded),
                tied=whole.tied,
            )
    return snapshot


def _weights(
    model: ModelMap, shard: ZeroShard, excluded: set[str], named: Callable[[str], str]
) -> Iterator[OwnedFragment]:
    for flat in shard.flats:
        for fragment in flat.fragments:
            own = model.fragment(fragment.name)
            data = flat.view(flat.master, fragment)
            yield _owned(named(fragment.name), own, fragment.start, data)
    for loose in shard.loose:
        if loose.name in excluded:
            continue
        own = model.fragment(loose.name)
        data = loose.owned.within(loose.data)
        if loose.owned.length or (own.length == 0 and (own.is_expert or dist.get_rank() == 0)):
            yield _owned(named(loose.name), own, loose.start + loose.owned.start, data)


def _optimizer(model: ModelMap, shard: ZeroShard) -> Iterator[OwnedFragment]:
    for flat in shard.flats:
        for state, values in elementwise(flat):
            for fragment in flat.fragments:
                name = state_name(state, fragment.name)
                own = model.fragment(fragment.name)
                yield _owned(name, own, fragment.start, flat.view(values, fragment))


def _owned(tensor: str, own: ParameterFragment, start: int, data: Tensor) -> OwnedFragment:
    """``data`` begins at ``start`` in what this rank has of the parameter."""
    return OwnedFragment.of(tensor, own.shape, own.start + start, data)


def _replicated(
    model: ModelMap,
    tensors: Mapping[str, Tensor],
    topology: Topology,
    named: Callable[[str], str],
) -> Iterator[OwnedFragment]:
    """The tensors that one rank writes for all: buffers and other entries of state dicts.

    Rank 0 writes what every rank has. The buffers of a module expert are written by the first rank
    that holds the expert; the first replicas of all experts are on the first ranks.
    """
    rank = dist.get_rank()
    sharded = model.sharded_modules
    is_first_replica = rank < topology.expert_parallel_size
    for name, tensor in tensors.items():
        if rank == 0 or (is_first_replica and expert_of(name, sharded)):
            flat = tensor.detach().contiguous().view(-1)
            yield OwnedFragment.of(named(name), tensor.shape, 0, flat)


def _rows(groups: Iterable[NamedGroup]) -> list[dict[str, Any]]:
    """Groups as plain data for JSON and other ranks, with tensors on the CPU."""
    return [
        {
            "params": group.params,
            "options": {
                k: v.cpu() if isinstance(v, Tensor) else v for k, v in group.options.items()
            },
        }
        for group in groups
    ]


def _optimizer_info(whole: Inventory, zero: ZeroState, model: ModelMap) -> dict[str, Any]:
    trained = {name: list(part.expert_ids) for name, part in model.trained.items()}
    return {
        "class": type(zero.zero.optimizer).__name__,
        "groups": whole.groups,
        "user_groups": whole.user_groups,
        "scalars": whole.scalars,
        **({"trained_experts": trained} if trained else {}),
    }


def _engine_info(engine: Any, zero: ZeroState) -> dict[str, Any]:
    counters = {name: getattr(engine, name) for name in COUNTERS}
    return {"counters": counters, "loss_scaler": zero.scaler()}


def _version() -> str:
    with suppress(PackageNotFoundError):
        return version("lightning-fastmoe")
    return "(not installed)"
