"""A checkpoint that every rank writes for itself, and that resumes on the same topology alone.

A directory: ``topology.json`` (written last: without it the checkpoint is incomplete and refused),
``client.pt`` (Lightning's own state, written by rank 0), ``model_ep_*.pt`` (parameters and buffers
of one expert parallel rank, ZeRO 1 and 2) and ``rank_*.pt`` (each rank's ZeRO partitions).

Loading on other ranks, another ``expert_parallel_size`` or another ZeRO stage raises
:class:`~lightning_fastmoe.errors.CheckpointError`; nothing is ever loaded into the wrong expert.
"""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
_OWN_FILE = re.compile(r"topology\.json|client\.pt|(model_ep|rank)_\d{5}\.pt")


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

    Raises:
        CheckpointError: on all ranks, if one can't write, or if the directory holds other files.
    """
    directory = _local_path(path)
    if user_groups is not None:
        user_groups.push()  # what a scheduler has set for the next step belongs to the state
    rank = dist.get_rank()
    frozen = _frozen(engine.module) if exclude_frozen else set()
    with _together(directory):
        if rank == 0:
            _make_room(directory)
    with _together(directory):
        zero = zero_state_of(engine)
        ep_rank, is_first_replica = divmod_rank(rank, topology)
        if not zero.partitions_parameters and is_first_replica:
            weights = {k: v for k, v in engine.module.state_dict().items() if k not in frozen}
            torch.save(weights, directory / f"model_ep_{ep_rank:05d}.pt")
        # After validation the engine has no optimizer, but Lightning asks for its state.
        with_optimizer = "optimizer_states" in client_state and engine.basic_optimizer is not None
        state = _rank_state(engine, zero, with_optimizer, user_groups, frozen)
        torch.save(state, directory / f"rank_{rank:05d}.pt")
        if rank == 0:
            client = {k: v for k, v in client_state.items() if k not in _NOT_CLIENT}
            torch.save(client, directory / "client.pt")
    with _together(directory):
        if rank == 0:
            about = {"format": FORMAT, "without": sorted(frozen), **asdict(topology)}
            text = json.dumps(about, indent=1)
            (directory / "topology.json").write_text(text)


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
        CheckpointError: on all ranks, if the directory is no complete checkpoint of this package,
            was taken on another topology, or does not fit the model.
    """
    directory = _local_path(path)
    rank = dist.get_rank()
    with _together(directory):
        without = check_topology(directory, topology)
        state, weights, client = _read_all(directory, rank, topology, weights_only)
        if training and state["optimizer"] is None:
            raise CheckpointError(
                f"{directory} was saved with weights only, so training can't resume from it. Load"
                " it for validation, testing or prediction, or resume from a full checkpoint."
            )
        zero = zero_state_of(engine)
        if training:
            _check_layout(directory, state["layout"], zero.layout(_names(engine.module)))
    with _together(directory):
        if zero.partitions_parameters:
            zero.load_parameters(state["parameters"], strict, without)
            _load_buffers(engine.module, state["buffers"], strict)
        else:
            own = engine.module.state_dict()
            weights.update({name: own[name] for name in without if name in own})
            engine.module.load_state_dict(weights, strict=strict)
        if training:
            zero.load_optimizer(state["optimizer"])
            for name in _COUNTERS:
                setattr(engine, name, state["counters"][name])
            if user_groups is not None:
                user_groups.load_hyperparameters(state["user_groups"])
    client.setdefault("state_dict", {})
    return client


def _read_all(
    directory: Path, rank: int, topology: Topology, weights_only: bool | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(this rank's state, its weights (ZeRO 1 and 2), Lightning's state)."""
    state = _read(directory / f"rank_{rank:05d}.pt", weights_only=True)
    weights = {}
    if topology.stage != 3:
        ep_rank, _ = divmod_rank(rank, topology)
        weights = _read(directory / f"model_ep_{ep_rank:05d}.pt", weights_only=True)
    only = True if weights_only is None else weights_only
    return state, weights, _read(directory / "client.pt", weights_only=only)


def _make_room(directory: Path) -> None:
    """An empty directory, in the place of a file or a checkpoint, complete or not."""
    if directory.is_file():
        directory.unlink()
    elif directory.exists():
        others = [f.name for f in directory.iterdir() if not _OWN_FILE.fullmatch(f.name)]
        if others:
            raise CheckpointError(
                f"{directory} holds other files than a checkpoint's ({others[0]!r}, ...), which"
                " saving would delete. Choose another path."
            )
        (directory / "topology.json").unlink(missing_ok=True)
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


@contextmanager
def _together(directory: Path) -> Iterator[None]:
    """What fails on one rank inside fails on all at the end; otherwise the others would wait."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        own = error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if own is None else str(own))
    if isinstance(own, CheckpointError):
        raise own
    failed = {rank: message for rank, message in enumerate(messages) if message is not None}
    if failed:
        rank, message = next(iter(failed.items()))
        raise CheckpointError(
            f"{directory}: {len(failed)} rank(s) failed; rank {rank}: {message} If a checkpoint was"
            " being read, it does not fit this model and optimizer, or is damaged: choose another."
            " If it was being written, it is incomplete, and loading will refuse it."
        ) from own


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
        state["layout"] = zero.layout(_names(engine.module))
        state["optimizer"] = zero.optimizer()
        state["user_groups"] = user_groups.hyperparameters() if user_groups is not None else None
    return state


def _check_layout(directory: Path, saved: list[Any], own: list[Any]) -> None:
    """Optimizer state is flat: what lies where must be the same, or it would go to others."""
    if saved == own:
        return
    pairs = itertools.zip_longest(itertools.chain(*saved), itertools.chain(*own))
    before, now = next(((a, b) for a, b in pairs if a != b), ("other groups", "these"))
    raise CheckpointError(
        f"{directory} holds its optimizer state in another order: saved {before}, now {now}. The"
        " model's parameters must be defined in the same order, and be in the same groups of the"
        " optimizer, with the same sub_group_size, as in the run that saved."
    )


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


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
            " origin, allow their classes with torch.serialization.add_safe_globals([...]) before"
            " loading. (Trainer.fit(weights_only=False) does not reach this strategy in Lightning"
            " 2.6.)"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error} Choose another checkpoint.") from error
