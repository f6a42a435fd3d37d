"""Models that were trained in place become files for transformers, whatever their family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface.loading_runs import saves, saves_another_class, saves_what_was_read
from huggingface.sharding_runs import MORE_MODELS, Run, make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_fastmoe.checkpoint.tools import copying
from lightning_fastmoe.cli.entry import main
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import save_pretrained

RUNS = [Run(name, stage=1 + i % 3, steps=2) for i, name in enumerate(MORE_MODELS)]
RUNS += [
    Run("mixtral", sizes={"tie_word_embeddings": True}, steps=2),
    Run("qwen3_moe", world=4, ep=2, stage=3, steps=2),
    Run("olmoe", world=1, ep=1, steps=2),
    Run("qwen3_moe", precision="bf16-mixed", steps=2),
]


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize(
    "run", RUNS, ids=lambda r: f"{r.name}-{r.world}-{r.ep}-{r.stage}-{r.precision}{len(r.sizes)}"
)
def test_what_was_trained_is_written_and_read(run: Run, tmp_path: Path, rank_pool) -> None:
    weights = rank_pool.run(saves, run.world, run, tmp_path)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tuned.ckpt"]
    # Those that transformers itself writes for such a model, by their names and shapes.
    make_model(run).save_pretrained(tmp_path / "own")
    written, own = files_of(tmp_path / "model"), files_of(tmp_path / "own")
    assert {k: t.shape for k, t in written.items()} == {k: t.shape for k, t in own.items()}
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model) is type(make_model(run))
    changed = 0
    before = make_model(run).state_dict()
    for name, value in model.state_dict().items():
        if name in weights:  # the parameters
            assert torch.equal(value, weights[name]), name
            changed += not torch.equal(value, before[name])
    assert changed > 5
    assert model.config.to_dict().keys() == make_model(run).config.to_dict().keys()


@pytest.mark.parametrize(
    ("head", "stage"), [("AutoModelForSequenceClassification", 2), ("AutoModel", 3)]
)
def test_another_class_than_the_one_in_the_config(head, stage, tmp_path, rank_pool) -> None:
    run = Run("qwen3_moe", stage=stage, steps=1)
    make_model(run).save_pretrained(tmp_path / "start")
    given = (run, tmp_path / "start", head, tmp_path / "model")
    weights = rank_pool.run(saves_another_class, 2, *given)[0]
    auto = getattr(transformers, head)
    model, info = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.architectures == [type(model).__name__]
    assert {name for name, _ in model.named_parameters()} == weights.keys()
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name]), name


def test_the_command_writes_the_same_and_other_dtypes(tmp_path: Path, rank_pool, capsys) -> None:
    run = Run("gpt_oss", steps=1)
    weights = rank_pool.run(saves, 2, run, tmp_path)[0]
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    command = ["checkpoint", "export", str(tmp_path / "tuned.ckpt"), str(tmp_path / "again")]
    command += ["--config", str(tmp_path / "model")]
    assert main(command) == 0
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"
    first, again = files_of(tmp_path / "model"), files_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)

    command[3] = str(tmp_path / "small")
    assert main([*command, "--dtype", "bfloat16", "--max-shard-size", "4KB"]) == 0
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert model.dtype == torch.bfloat16
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name].bfloat16()), name

    capsys.readouterr()
    for arguments, reason in (
        (command[:4], "--config is missing"),
        ([*command[:3], str(tmp_path / "model"), *command[4:]], "exists already"),
        ([*command[:3], str(tmp_path / "x"), "--config", str(tmp_path)], "no config.json"),
        ([*command[:3], str(tmp_path / "x"), *command[4:], "--prefix", "my."], "is missing"),
    ):
        assert main(arguments) != 0
        said = capsys.readouterr().err
        assert reason in said
        assert "Traceback" not in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "stage"), [("deepseek_v3", 1), ("minimax_m2", 2), ("lfm2_moe", 3)]
)
def test_biases_of_routers_that_are_no_parameters(name, stage, tmp_path, rank_pool) -> None:
    """Start at zero, so that only other values show whether they are kept."""
    run = Run(name, stage=stage, steps=1)
    model = make_model(run)
    biases = [key for key, _ in model.named_buffers() if key in model.state_dict()]
    assert biases
    for key in biases:
        model.get_buffer(key).normal_(std=0.1)
    model.save_pretrained(tmp_path / "start")
    ends = rank_pool.run(saves_what_was_read, 2, run, tmp_path / "start", tmp_path)
    command = ["checkpoint", "export", str(tmp_path / "tuned.ckpt"), str(tmp_path / "again")]
    assert main([*command, "--config", str(tmp_path / "start")]) == 0
    for folder in ("model", "again"):
        written = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        for key in biases:
            assert torch.equal(written.get_buffer(key), model.get_buffer(key)), key
            assert all(torch.equal(kept[key], model.get_buffer(key)) for _, kept, _ in ends), key
    assert all(said.endswith("OSError: no space left") for _, _, said in ends), ends


def test_converted_experts_in_parts_and_another_dtype(tmp_path, rank_pool, monkeypatch) -> None:
    """Stacks that are read in many parts, and rounded before transformers takes them apart."""
    weights = rank_pool.run(saves, 2, Run("qwen3_moe", steps=1), tmp_path)[0]
    monkeypatch.setattr(copying, "BUFFER_BYTES", 40)
    command = ["checkpoint", "export", str(tmp_path / "tuned.ckpt")]
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        options = [
            "--config",
            str(tmp_path / "model"),
            "--dtype",
            str(dtype).removeprefix("torch."),
        ]
        assert main([*command, str(out), *options]) == 0
        assert {tensor.dtype for tensor in files_of(out).values()} == {dtype}
        for name, value in AutoModelForCausalLM.from_pretrained(out).named_parameters():
            assert torch.equal(value, weights[name].to(dtype)), name


def test_another_config_is_refused(tmp_path: Path, rank_pool, capsys) -> None:
    rank_pool.run(saves, 2, Run("qwen3_moe", steps=1), tmp_path)
    file = tmp_path / "model" / "config.json"
    for change, reason in (
        ({"moe_intermediate_size": 6}, r"not hold the model .*experts.*has shape"),
        ({"num_hidden_layers": 3}, r"no models with all .* weights"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* is not in that model"),
    ):
        config = json.loads(file.read_text())
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**config, **change, "layer_types": None}))
        command = ["checkpoint", "export", str(tmp_path / "tuned.ckpt"), str(tmp_path / "out")]
        assert main([*command, "--config", str(other)]) != 0
        assert re.search(reason, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


def test_while_checkpoints_are_written_in_the_background(tmp_path: Path, rank_pool) -> None:
    weights = rank_pool.run(saves, 2, Run("mixtral", steps=2), tmp_path, True)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name]), name


class OtherStrategy:
    strategy: Any = object()
    lightning_module: Any = None


def test_other_strategies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="object holds whole models; call save_pretrained of the"):
        save_pretrained(OtherStrategy(), tmp_path / "model")
