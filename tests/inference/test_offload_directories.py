"""Experts in host memory that come from a directory of FastMoEStrategy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from inference.offload_models import loader, trainer
from inference.trained_runs import EDITS, Edits, Factor, Trained, predict, train

from lightning_fastmoe import FastMoEStrategy, OffloadStrategy
from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.tools.consolidate import consolidate
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.testing import RankPool


@pytest.fixture(scope="module", params=["softmax", "sigmoid", "modules"])
def trained(
    request: Any, rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[torch.Tensor]]:
    """A kind of layers, the directory of a run on two ranks, and right predictions."""
    folder = tmp_path_factory.mktemp("trained")
    rank_pool.run(train, 2, request.param, str(folder / "run.ckpt"))
    with CheckpointReader(folder / "run.ckpt") as reader:
        consolidate(reader, folder / "one.ckpt", "torch")
    right = trainer("auto").predict(
        Trained(request.param), loader(), ckpt_path=folder / "one.ckpt", weights_only=True
    )
    assert right is not None
    untrained = trainer("auto").predict(Trained(request.param), loader())
    assert not torch.allclose(right[0], untrained[0], atol=1e-2)  # type: ignore[index]
    return request.param, folder / "run.ckpt", right  # type: ignore[return-value]


def test_one_device(trained: tuple[str, Path, list[torch.Tensor]]) -> None:
    kind, path, right = trained
    module = Trained(kind)
    own = trainer(OffloadStrategy())
    for _ in range(2):  # a second call reads it again, into the same parameters
        found: Any = own.predict(module, loader(), ckpt_path=path)
        for a, b in zip(found, right, strict=True):
            assert torch.equal(a, b)
        assert module.note == "trained"
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(torch.nan)


def test_several_processes(
    trained: tuple[str, Path, list[torch.Tensor]], rank_pool: RankPool
) -> None:
    kind, path, right = trained
    for found, note in rank_pool.run(predict, 2, kind, str(path), timeout=60):
        for a, b in zip(found, right, strict=True):
            assert torch.equal(a, b)
        assert note == "trained"


def test_processes_share_experts_that_hooks_can_t_edit(
    trained: tuple[str, Path, list[torch.Tensor]], rank_pool: RankPool
) -> None:
    kind, path, right = trained
    for edit in ("in place", "replaced"):
        for _, said in rank_pool.run(predict, 2, kind, str(path), edit, timeout=60):
            assert re.search(r"on_load_checkpoint has changed .*\.experts\..*consolidate", said)
    for found, note in rank_pool.run(predict, 2, kind, str(path), "norm", timeout=60):
        assert note == "trained"
        assert not torch.allclose(found[0], right[0])


def test_what_a_hook_edits(trained: tuple[str, Path, list[torch.Tensor]]) -> None:
    kind, path, right = trained
    name = "network.norm.weight"
    own = trainer(OffloadStrategy())

    def outcome(edit: Any) -> Any:
        module = Edits(kind)
        module.edit = edit
        return own.predict(module, loader(), ckpt_path=path)

    for edit in (
        lambda weights: weights[name].mul_(2),
        lambda weights: weights.update({name: 2 * weights[name]}),
        lambda weights: weights["factor._extra_state"].mul_(2),
        EDITS["in place"],
    ):
        assert not torch.allclose(outcome(edit)[0], right[0])
    with pytest.raises(CheckpointError, match=rf"on_load_checkpoint has removed {name}"):
        outcome(lambda weights: weights.pop(name))
    with pytest.raises(RuntimeError, match="other.weight"):
        outcome(lambda weights: weights.update({"other.weight": torch.ones(1)}))


def test_damaged_or_other_directories(
    trained: tuple[str, Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    _, path, _ = trained
    with pytest.raises(CheckpointError):
        trainer(OffloadStrategy()).predict(Trained("shared"), loader(), ckpt_path=path)
    copy = tmp_path / "run.ckpt"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "weights_00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="weights_00001.safetensors"):
        trainer(OffloadStrategy()).predict(Trained(trained[0]), loader(), ckpt_path=copy)


def test_load_weights_takes_extra_states(trained: tuple[str, Path, list[torch.Tensor]]) -> None:
    kind, path, _ = trained
    module, part = Trained(kind), Factor()
    module.configure_model()
    load_weights(path, module)
    load_weights(path, part, prefix="factor.")
    assert (module.note, float(module.factor.factor), float(part.factor)) == ("trained", 3, 3)


class Other:
    """No plain data."""


def test_objects_that_are_not_plain_data(
    trained: tuple[str, Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    kind, _, _ = trained
    module = Trained(kind)
    module.note = Other()  # type: ignore[assignment]
    path = tmp_path / "odd.ckpt"
    own = trainer(FastMoEStrategy())
    own.predict(module, loader())
    with pytest.warns(UserWarning, match="plain data"):
        own.save_checkpoint(path)
    found, weights = Trained(kind), trainer(OffloadStrategy())
    with pytest.raises(CheckpointError, match="pass weights_only=False"):
        weights.predict(found, loader(), ckpt_path=path)
    assert found.note == "new"
    weights.predict(found, loader(), ckpt_path=path, weights_only=False)
    assert isinstance(found.note, Other)


def test_urls_are_lightnings_files(
    trained: tuple[str, Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    kind, path, right = trained
    with CheckpointReader(path) as reader:
        consolidate(reader, tmp_path / "one.ckpt", "torch")
    with fsspec.open("memory://one.ckpt", "wb") as file:
        file.write((tmp_path / "one.ckpt").read_bytes())
    found: Any = trainer(OffloadStrategy()).predict(
        Trained(kind), loader(), ckpt_path="memory://one.ckpt", weights_only=True
    )
    assert torch.equal(found[0], right[0])
