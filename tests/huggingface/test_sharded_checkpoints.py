"""Checkpoints of transformers' models with sharded experts: by global id, for any topology."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface.sharding_runs import (
    EpochPerStep,
    Run,
    assert_close,
    fit_epochs,
    reference,
    refuses_save_pretrained,
)
from transformers import AutoModelForCausalLM

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.cli.entry import main

SAVING = Run(world=2, ep=2, stage=2, accumulate=2, steps=4)
RESUMING = {
    "1 rank": replace(SAVING, world=1, ep=1, stage=1, accumulate=4),
    "4 ranks": replace(SAVING, world=4, ep=4, stage=3, accumulate=1),
    "replicas": replace(SAVING, world=4, ep=2, stage=1, accumulate=1),
}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_resumes_on_any_topology(name: str, rank_pool, tmp_path: Path) -> None:
    saving = replace(SAVING, name=name)
    expected = reference(saving)
    rank_pool.run(fit_epochs, 2, saving, 2, tmp_path / "first.ckpt")
    with CheckpointReader(tmp_path / "first.ckpt") as reader:
        assert set(reader.manifest.moe_layers.values()) == {8 if name == "qwen3_moe" else 4}
        assert len(reader.manifest.moe_layers) == 2
    for what, run in RESUMING.items():
        run = replace(run, name=name)
        arguments = (run, 4, tmp_path / f"{what}.ckpt", tmp_path / "first.ckpt")
        for weights in rank_pool.run(fit_epochs, run.world, *arguments):
            for own, twin in zip(weights, expected.weights[2:], strict=True):
                assert own.keys() == twin.keys()
                for key, weight in twin.items():
                    assert_close(own[key], weight, f"{key} on {what}")
    for what in RESUMING:  # all of them saved the same
        loaded = EpochPerStep.load_from_checkpoint(tmp_path / f"{what}.ckpt", run=saving)
        for key, weight in loaded.net.state_dict().items():
            assert_close(weight, expected.weights[3][key], f"{key} of {what}")


def test_tools_and_files_of_transformers(rank_pool, tmp_path: Path, capsys) -> None:
    path = tmp_path / "sharded.ckpt"
    rank_pool.run(fit_epochs, 2, SAVING, 2, path)
    for command in (
        ["verify", path],
        ["inspect", path],
        ["reshard", path, tmp_path / "again.ckpt", "--ranks", "1"],
        ["diff", path, tmp_path / "again.ckpt"],
        ["consolidate", path, tmp_path / "one.ckpt"],
    ):
        assert main(["checkpoint", *map(str, command)]) == 0, (command, capsys.readouterr())
    expected = reference(SAVING).weights[1]
    for file in (path, tmp_path / "one.ckpt"):
        loaded = EpochPerStep.load_from_checkpoint(file, run=SAVING)
        for key, weight in loaded.net.state_dict().items():
            assert_close(weight, expected[key], key)
    loaded.net.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.num_experts == 8
    found = model.state_dict()
    for key, weight in expected.items():
        assert torch.equal(found[key], loaded.net.state_dict()[key])
        assert_close(found[key], weight, key)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sharded_model_refuses_what_would_lose_experts(stage: int, rank_pool, tmp_path) -> None:
    run = Run(stage=stage, steps=1)
    for rank, said in enumerate(rank_pool.run(refuses_save_pretrained, 2, run, tmp_path / "model")):
        ids = ("0..3", "4..7")[rank]
        save, push, used, eager = said
        assert f"save_pretrained would write experts {ids} of net.model.layers.0.mlp" in save
        assert "as all 8" in save
        assert "lightning_fastmoe.huggingface.save_pretrained(trainer, path)" in save
        assert push == save
        assert used.startswith("UnmanagedExpertsError: net.model.layers.0.mlp holds 4 of 8 experts")
        assert "experts_implementation='eager' would take for all of them" in eager
