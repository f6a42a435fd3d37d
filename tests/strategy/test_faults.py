"""A save that fails on one rank fails on all alike, and training goes on as if nothing was."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from strategy.models import Case
from strategy.resume_runs import Resumed, error_of, trainer_for
from strategy.tracing import whole_weights

from lightning_fastmoe.checkpoint import CheckpointReader, save
from lightning_fastmoe.checkpoint.format import layout, publish, safetensors_stream, writer


def _fail(code: int, path: str) -> Any:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code), path)

    return failing


@contextmanager
def _small_files() -> Iterator[None]:
    """The system itself stops writing in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@contextmanager
def _interrupted() -> Iterator[None]:
    with mock.patch.object(writer, "write_shard", side_effect=MemoryError("no room")):
        yield


@contextmanager
def _full_while_several_are_written() -> Iterator[None]:
    """As the system says it: a number, and no name of a file."""
    with (
        mock.patch.object(layout, "MIN_FILE_BYTES", 64),
        mock.patch.object(layout, "_WHOLE", 8),
        mock.patch.object(
            safetensors_stream.files,
            "write_all",
            side_effect=lambda *_: os.write(_full_device(), b"0"),
        ),
    ):
        yield


def _full_device() -> int:
    return os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)


FAULTS: dict[str, tuple[int, Any, str]] = {
    "disk full on rank 1": (
        1,
        lambda path: mock.patch.object(
            safetensors_stream.files, "write_all", _fail(errno.ENOSPC, f"{path}/weights")
        ),
        "No space left on device",
    ),
    "disk full while rank 1 writes several files": (
        1,
        lambda path: _full_while_several_are_written(),
        "_00001_",  # the file is named
    ),
    "file too large on rank 0": (0, lambda path: _small_files(), "File too large"),
    "input/output error on rank 1": (
        1,
        lambda path: mock.patch.object(os, "fsync", _fail(errno.EIO, f"{path}/weights")),
        "Input/output error",
    ),
    "read-only directory": (
        0,
        lambda path: mock.patch.object(Path, "mkdir", _fail(errno.EROFS, path)),
        "Read-only file system",
    ),
    "the last rename fails": (
        0,
        lambda path: mock.patch.object(publish, "exchange", _fail(errno.EIO, path)),
        "Input/output error",
    ),
    "the manifest can't be written": (
        0,
        lambda path: mock.patch.object(save, "write_manifest", _fail(errno.EDQUOT, path)),
        "Disk quota exceeded",
    ),
    "another kind of error on rank 1": (1, lambda path: _interrupted(), "MemoryError: no room"),
}
"""What goes wrong, on which rank: (rank, how, the system's words)."""


def state_hash(trainer: pl.Trainer) -> str:
    """Of weights, master weights, optimizer states and random numbers."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    engine = trainer.strategy.deepspeed_engine
    for parameter in engine.module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    for state in engine.optimizer.optimizer.state.values():
        for value in state.values():
            digest.update(torch.as_tensor(value).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Seen:
    """What came of the faults: errors, states of training, and files beside the checkpoint."""

    errors: dict[str, tuple[str, str]] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)
    left: dict[str, list[str]] = field(default_factory=dict)


class FailingSaves(pl.Callback):
    """Saves once, then goes through all faults."""

    def __init__(self, path: str | None) -> None:
        self.path, self.seen = path, Seen()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch or self.path is None:
            return
        trainer.save_checkpoint(self.path)
        self.seen.hashes.add(state_hash(trainer))
        for name, (rank, fault, _) in FAULTS.items():
            if dist.get_rank() == rank:
                with fault(self.path):
                    self.seen.errors[name] = error_of(trainer.save_checkpoint, self.path)
            else:
                self.seen.errors[name] = error_of(trainer.save_checkpoint, self.path)
            self.seen.hashes.add(state_hash(trainer))
            self.seen.left[name] = sorted(os.listdir(Path(self.path).parent))


def through_all_faults(case: Case, path: str | None) -> tuple[Seen, Any]:
    """Two epochs, with failing saves in between or without; (what happened, the weights)."""
    pl.seed_everything(7, verbose=False)
    module = Resumed(case, "cosine")
    callback = FailingSaves(path)
    trainer = trainer_for(case, 2, callbacks=[callback])
    trainer.fit(module)
    return callback.seen, whole_weights(module.net)


COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single"),
    *("broadcast", "gather", "reduce", "reduce_scatter_tensor", "scatter", "send"),
)


def traffic_of_a_save(case: Case, path: str) -> tuple[int, int]:
    """(bytes that collectives carried while saving, bytes of the checkpoint's data)."""
    trainer = trainer_for(case, 1)
    trainer.fit(Resumed(case, "cosine"))
    sent = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            for value in [*args, *kwargs.values()]:
                tensors = value if isinstance(value, list | tuple) else [value]
                sent += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            return function(*args, **kwargs)

        return call

    patches = [
        mock.patch.object(owner, name, counted(getattr(owner, name)))
        for owner in (dist, dist.distributed_c10d)
        for name in COLLECTIVES
    ]
    for patch in patches:
        patch.start()
    try:
        trainer.save_checkpoint(path)
    finally:
        for patch in patches:
            patch.stop()
    data = sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
    return sent, data


def case_of(stage: int, **kwargs) -> Case:
    return Case(2, 2, stage, steps=2, **kwargs)


@pytest.mark.parametrize("stage", [2, 3])
def test_every_fault_is_named_on_all_ranks_and_harms_nothing(rank_pool, tmp_path, stage):
    path = tmp_path / "last.ckpt"
    results = rank_pool.run(through_all_faults, 2, case_of(stage), str(path))
    undisturbed = rank_pool.run(through_all_faults, 2, case_of(stage), None)
    (first, _), (second, _) = results
    assert first.errors == second.errors
    assert first.errors.keys() == FAULTS.keys()
    for name, (rank, _, words) in FAULTS.items():
        kind, message = first.errors[name]
        assert kind == "CheckpointError", name
        assert str(path) in message, name
        assert f"could not be saved: rank {rank} failed" in message, name
        assert words in message, name
        assert first.left[name] == ["last.ckpt"], name
    with CheckpointReader(path) as reader:
        reader.verify()
        assert reader.manifest.progress["global_step"] == 1
    for (seen, weights), (_, expected) in zip(results, undisturbed, strict=True):
        assert len(seen.hashes) == 1, "a failed save has changed the state of training"
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_send_each_other_nothing_but_metadata(rank_pool, tmp_path, stage):
    """A model twice as wide has four times the data, and the same metadata."""
    sizes = {}
    for width in (1, 2):
        case = case_of(stage, num_experts=(4 * width, 8 * width))
        path = str(tmp_path / f"{width}.ckpt")
        sizes[width] = rank_pool.run(traffic_of_a_save, 2, case, path)
    for (sent, data), (sent_twice, data_twice) in zip(sizes[1], sizes[2], strict=True):
        assert data_twice > 1.7 * data
        assert 0 < sent_twice < 1.05 * sent
