"""A checkpoint that every rank writes for itself, and that resumes on the same topology alone.

A directory: ``topology.json`` (written last: without it the checkpoint is incomplete and refused),
``client.pt`` (Lightning's own state, written by rank 0), ``model_ep_*.pt`` (parameters and buffers
of one expert parallel rank, ZeRO 1 and 2) and ``rank_*.pt`` (each rank's ZeRO partitions).

Loading on other ranks, another ``expert_parallel_size`` or another ZeRO stage raises
:class:`~lightning_fastmoe.errors.CheckpointError`; nothing is ever loaded into the wrong expert.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fastmoe.checkpoint.zero_state import ZeroState, zero_state_of
from lightning_fastmoe.errors import CheckpointError

FORMAT = 1
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_NOT_CLIENT = ("state_dict", "optimizer_states")


@dataclass(frozen=True)
class Topology:
    """What must be the same between the run that saved and the run that loads."""

    world_size: int
    expert_parallel_size: int
    stage: int
    precision: str
    num_experts: dict[str, int]


def save(
    path: Any,
    *,
    engine: Any,
    topology: Topology,
    client_state: dict[str, Any],
    user_groups: Any,
    exclude_frozen: bool = False,
) -> None:
    """Writes a checkpoint; every rank calls this.

    Args:
        path: the directory, the same on all ranks; an existing checkpoint there is replaced.
        engine: the DeepSpeed engine.
        topology: of this run.
        client_state: Lightning's checkpoint dictionary; weights and optimizer states are left out.
        user_groups: the optimizer's groups as schedulers see them, or None.
        exclude_frozen: leave out parameters that are not trained; they must be there on loading.
    """
    directory = _local_path(path)
    if user_groups is not None:
        user_groups.push()  # what a scheduler has set for the next step belongs to the state
    rank = dist.get_rank()
    if rank == 0:
        if directory.is_file():
            directory.unlink()
        elif directory.exists():
            (directory / "topology.json").unlink(missing_ok=True)
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
    dist.barrier()
    with_optimizer = "optimizer_states" in client_state
    zero = zero_state_of(engine)
    ep_rank, is_first_replica = divmod_rank(rank, topology)
    frozen = _frozen(engine.module) if exclude_frozen else set()
    if not zero.partitions_parameters and is_first_replica:
        weights = {k: v for k, v in engine.module.state_dict().items() if k not in frozen}
        torch.save(weights, directory / f"model_ep_{ep_rank:05d}.pt")
    torch.save(
        _rank_state(engine, zero, with_optimizer, user_groups, frozen),
        directory / f"rank_{rank:05d}.pt",
    )
    if rank == 0:
        client = {k: v for k, v in client_state.items() if k not in _NOT_CLIENT}
        torch.save(client, directory / "client.pt")
    dist.barrier()
    if rank == 0:
        about = {"format": FORMAT, "without": sorted(frozen), **asdict(topology)}
        text = json.dumps(about, indent=1)
        (directory / "topology.json").write_text(text)
    dist.barrier()


def load(
    path: Any,
    *,
    engine: Any,
    topology: Topology,
    training: bool,
    strict: bool,
    weights_only: bool | None,
    user_groups: Any,
) -> dict[str, Any]:
    """Restores a checkpoint into a freshly built engine; every rank calls this.

    Args:
        path: the directory that :func:`save` wrote.
        engine: the DeepSpeed engine.
        topology: of this run.
        training: restore optimizer state and counters too.
        strict: parameter names must match exactly.
        weights_only: for Lightning's own state: False also unpickles arbitrary objects, so only for
            files that you trust. None means True.
        user_groups: as for :func:`save`.

    Returns:
        Lightning's checkpoint dictionary.

    Raises:
        CheckpointError: if the directory is no complete checkpoint of this package, or was taken on
            another topology.
    """
    directory = _local_path(path)
    without = check_topology(directory, topology)
    rank = dist.get_rank()
    zero = zero_state_of(engine)
    ep_rank, _ = divmod_rank(rank, topology)
    state = _read(directory / f"rank_{rank:05d}.pt", weights_only=True)
    if zero.partitions_parameters:
        zero.load_parameters(state["parameters"], strict, without)
        _load_buffers(engine.module, state["buffers"], strict)
    else:
        weights = _read(directory / f"model_ep_{ep_rank:05d}.pt", weights_only=True)
        own = engine.module.state_dict()
        weights.update({name: own[name] for name in without if name in own})
        engine.module.load_state_dict(weights, strict=strict)
    if training:
        if state["optimizer"] is None:
            raise CheckpointError(
                f"{directory} was saved with weights only, so training can't resume from it. Load"
                " it for validation, testing or prediction, or resume from a full checkpoint."
            )
        zero.load_optimizer(state["optimizer"])
        for name in _COUNTERS:
            setattr(engine, name, state["counters"][name])
        if user_groups is not None:
            user_groups.load_hyperparameters(state["user_groups"])
    client: dict[str, Any] = _read(
        directory / "client.pt", weights_only=True if weights_only is None else weights_only
    )
    client.setdefault("state_dict", {})
    dist.barrier()
    return client


def check_topology(directory: Path, topology: Topology) -> list[str]:
    """Refuses a directory whose checkpoint does not fit this run.

    Returns:
        The frozen parameters that it was saved without.

    Raises:
        CheckpointError: naming every difference.
    """
    file = directory / "topology.json"
    if not file.is_file():
        what = "does not exist" if not directory.exists() else "holds no topology.json"
        raise CheckpointError(
            f"{directory} {what}, so it is no complete checkpoint of FastMoEStrategy: saving writes"
            " that file last. Choose another checkpoint."
        )
    saved = json.loads(file.read_text())
    version = saved.pop("format", None)
    if version != FORMAT:
        raise CheckpointError(
            f"{directory} has format {version}; this version reads format {FORMAT}. Load it with"
            " the version that wrote it."
        )
    now = asdict(topology)
    differences = [
        f"{k}: saved {saved.get(k)}, now {now[k]}" for k in now if saved.get(k) != now[k]
    ]
    if differences:
        raise CheckpointError(
            f"{directory} was saved on another topology ({'; '.join(differences)}), and its files"
            " fit that one only. Resume with the same number of ranks, expert_parallel_size, stage,"
            " precision and model."
        )
    return list(saved.get("without", []))


def divmod_rank(rank: int, topology: Topology) -> tuple[int, bool]:
    """(expert parallel rank, whether this is the first replica of its experts)."""
    replica, ep_rank = divmod(rank, topology.expert_parallel_size)
    return ep_rank, replica == 0


def _rank_state(
    engine: Any, zero: ZeroState, with_optimizer: bool, user_groups: Any, frozen: set[str]
) -> dict[str, Any]:
    state: dict[str, Any] = {"optimizer": None, "user_groups": None}
    state["counters"] = {name: getattr(engine, name) for name in _COUNTERS}
    if zero.partitions_parameters:
        state["parameters"] = {n: p for n, p in zero.parameters().items() if n not in frozen}
        state["buffers"] = dict(_buffers(engine.module))
    if with_optimizer:
        state["optimizer"] = zero.optimizer()
        state["user_groups"] = user_groups.hyperparameters() if user_groups is not None else None
    return state


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    keys = set(module.state_dict().keys())
    return [(name, b.detach().clone()) for name, b in module.named_buffers() if name in keys]


def _load_buffers(module: nn.Module, saved: dict[str, Tensor], strict: bool) -> None:
    own = dict(module.named_buffers())
    if strict and (missing := saved.keys() ^ {name for name, _ in _buffers(module)}):
        raise CheckpointError(f"Buffers {sorted(missing)} are in only one of checkpoint and model.")
    for name, value in saved.items():
        if name in own:
            own[name].copy_(value)


def _local_path(path: Any) -> Path:
    if "://" in str(path):
        raise CheckpointError(
            f"{path} is not a local path. Checkpoints are directories on a file system that all"
            " ranks share."
        )
    return Path(path)


def _read(file: Path, *, weights_only: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=weights_only)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds objects that are not plain data, or is damaged: {error} If you trust its"
            " origin, pass weights_only=False to the Trainer's method."
        ) from error
