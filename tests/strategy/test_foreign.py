"""Files of Lightning, torch and safetensors load into any topology."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from strategy import foreign_runs as runs
from strategy.reshard_runs import Layout


@pytest.fixture(scope="module")
def files(rank_pool, tmp_path_factory):
    """(directory, losses, weights at the end) of a run by Lightning alone."""
    directory = tmp_path_factory.mktemp("foreign")
    ((losses, weights),) = rank_pool.run(runs.write_files, 1, str(directory))
    return directory, losses, weights


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(2, 2, 2), Layout(4, 2, 3)], ids=str)
def test_lightnings_checkpoint_resumes(rank_pool, files, layout):
    directory, losses, expected = files
    path = str(directory / "lightning.ckpt")
    results = rank_pool.run(runs.resume, layout.world, layout, path)
    means = [sum(step) / len(step) for step in zip(*(r[0] for r in results), strict=True)]
    assert means == pytest.approx(losses[runs.SAVED :], rel=1e-6)
    for _, weights in results:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[f"net.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lightning.ckpt", "state_dict.pt", "model.safetensors"])
@pytest.mark.parametrize("layout", [Layout(2, 2, 2), Layout(2, 2, 3)], ids=str)
def test_weights_load_bit_by_bit(rank_pool, files, layout, name):
    directory = files[0]
    expected = torch.load(directory / "state_dict.pt", weights_only=True)
    for weights in rank_pool.run(runs.load, layout.world, layout, str(directory / name)):
        for key, weight in weights.items():
            assert torch.equal(weight, expected[f"net.{key}"]), key


@pytest.mark.parametrize("gated", [False, True])
def test_deepspeeds_own_moe_checkpoint_loads(rank_pool, tmp_path, gated):
    """Written by DeepSpeed's engine on two ranks with half of the experts each."""
    outputs = rank_pool.run(runs.write_deepspeed, 2, str(tmp_path), gated)
    for layout in (Layout(2, 2, 2), Layout(2, 1, 3), Layout(1, 1, 1)):
        loaded = rank_pool.run(runs.load_deepspeed, layout.world, layout, str(tmp_path), gated)
        for weights in loaded:
            assert weights.keys() == outputs[0].keys()
            for name, weight in weights.items():
                assert torch.equal(weight, outputs[0][name]), name


def test_what_does_not_allow_to_resume_is_refused(rank_pool, files, tmp_path):
    directory: Path = files[0]
    half = torch.load(directory / "lightning.ckpt", weights_only=True)
    name = "net.moes.1.experts.up_proj"
    half["state_dict"][name] = half["state_dict"][name][:4]
    torch.save(half, tmp_path / "half.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((directory / "lightning.ckpt").read_bytes()[:-500])
    torch.save([1], tmp_path / "list.ckpt")
    paths = [tmp_path / n for n in ("half.ckpt", "cut.ckpt", "list.ckpt")]
    paths += [directory / "state_dict.pt", directory / "model.safetensors"]
    words = [
        r"state 'exp_avg' of 'net.moes.1.experts.up_proj' has the shape \[8,.*parameter has \[4,",
        "cut.ckpt",
        "holds a list",
        "saved with weights only",
        "saved with weights only",
    ]
    layout = Layout(2, 2, 2)
    for errors in rank_pool.run(runs.refusals, 2, layout, [str(p) for p in paths]):
        for (kind, message), pattern in zip(errors, words, strict=True):
            assert kind == "CheckpointError", pattern
            with pytest.raises(RuntimeError, match=pattern):
                raise RuntimeError(message)
