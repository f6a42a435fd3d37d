"""Comparing checkpoints, and what training from them gave."""

from __future__ import annotations

from pathlib import Path

import torch
from strategy import midway_runs
from strategy import reshard_runs as runs

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.param_options import by_parameter, same


def mean_losses(results: list[runs.Steps]) -> list[float]:
    return [sum(step) / len(step) for step in zip(*(r.losses for r in results), strict=True)]


def assert_goes_on(straight: midway_runs.Run, rest: midway_runs.Run, done: int) -> None:
    """The run that resumed after so many batches gives the same bits as the uninterrupted one."""
    assert rest.losses == straight.losses[done:]
    assert rest.norms == straight.norms[-len(rest.norms) :]
    assert all(torch.equal(rest.weights[name], w) for name, w in straight.weights.items())


def content(path: Path):
    """Everything that the topology must not change."""
    with CheckpointReader(path) as reader:
        reader.verify()
        experts = reader.manifest.module_experts
        tied, excluded = reader.manifest.tied, reader.manifest.excluded
        tensors = {name: reader.read(name) for name in reader.manifest.tensors}
        state = reader.read_state()
    optimizer = state["optimizer"]
    about = {
        "module experts": experts,
        "tied": tied,
        "excluded": list(excluded),
        "options": by_parameter(optimizer["groups"], "options"),
        "user options": by_parameter(optimizer["user_groups"], "options"),
        "scalars": by_parameter(optimizer["scalars"], "values"),
        "class": optimizer["class"],
        "engine": state["engine"],
        "schedulers": state["lightning"]["lr_schedulers"],
        "step": state["lightning"]["global_step"],
    }
    return tensors, about


def assert_same_content(path: Path, again: Path, some_expert: str = "up_proj") -> None:
    """``some_expert``: a trained parameter of the second layer's experts."""
    (expected, about), (found, about_found) = content(path), content(again)
    assert found.keys() == expected.keys()
    assert {"weights/net.norm.weight", "weights/steps_seen"} <= found.keys()
    assert "optimizer/exp_avg_sq/net.moes.1.experts." + some_expert in found
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert about["options"]["net.embed.weight"]["lr"] > 0
    assert about["scalars"]["net.embed.weight"]["step"] == runs.SAVED
    for key, value in about.items():
        assert same(about_found[key], value), key


def assert_same_files(expected: str | Path, found: str | Path) -> None:
    """The same bytes in every file; what differs is named by tensor first."""
    with CheckpointReader(Path(expected)) as one, CheckpointReader(Path(found)) as other:
        other.verify()
        assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
        for name in one.manifest.tensors:
            assert torch.equal(one.read(name), other.read(name)), (found, name)
        assert one.manifest.files == other.manifest.files
