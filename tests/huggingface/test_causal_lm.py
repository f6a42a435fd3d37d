"""Fine-tuning a model from Hugging Face: import, train on ranks, export."""

from __future__ import annotations

import copy
import shutil
from functools import partial

import pytest
import torch
import transformers
from huggingface.families import TOLERANCE, files_of, logits_of, make_model, make_tokens, same
from huggingface.finetune_runs import batch_of, finetune

from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.checkpoint.whole import read_whole
from lightning_fastmoe.cli import main
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.huggingface import MoECausalLM


def run(*words) -> None:
    assert main(["checkpoint", *map(str, words)]) == 0


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3_moe")


@pytest.fixture(scope="module")
def imported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("imported")
    model.save_pretrained(path / "hf")
    run("import", path / "hf", path / "start.ckpt")
    return path / "start.ckpt"


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 2), (2, 3)])
def test_import_train_export(rank_pool, model, imported, tmp_path, world, stage):
    """The first loss is that of transformers; without learning the weights come back unchanged."""
    saved = tmp_path / "run.ckpt"
    results = rank_pool.run(finetune, world, str(imported), str(saved), stage, 0.0, world)
    for rank, (losses, experts) in enumerate(results):
        assert experts == 6 // world
        with torch.no_grad():
            expected = float(model(**batch_of(rank)).loss)
        assert losses == pytest.approx([expected] * 2, abs=TOLERANCE)
    run("verify", saved)
    run("export", saved, tmp_path / "out", "--to", "qwen3_moe")
    assert same(files_of(tmp_path / "out"), files_of(imported.parent / "hf"))


def test_adapters_are_merged_by_export(rank_pool, model, imported, tmp_path, capsys):
    """By the scale in the checkpoint; the twin has B A added by hand."""
    saved = tmp_path / "run.ckpt"
    train = partial(finetune, lora_rank=2, lora_alpha=5.0)
    rank_pool.run(train, 2, str(imported), str(saved), 3, 1e-2, 2)
    export = ["checkpoint", "export", str(saved), str(tmp_path / "out"), "--to", "qwen3_moe"]
    assert main([*export, "--lora-scale", "2"]) != 0
    assert "--lora-scale 2.0 is not the 2.5 with which" in capsys.readouterr().err
    assert main(export) == 0
    state = read_whole(saved)["state_dict"]
    found, start = files_of(tmp_path / "out"), files_of(imported.parent / "hf")
    moved = set()
    for key, value in start.items():
        layer, is_expert, rest = key.partition(".experts.")
        if not is_expert:
            assert torch.equal(found[key], value), key
            continue
        i, name = int(rest.split(".")[0]), rest.split(".")[1]
        width = value.shape[0]
        rows = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}.get(name, slice(None))
        stack = f"network.{layer}.experts.{'down' if name == 'down_proj' else 'up'}_proj"
        a, b = (state[f"{stack}_lora_{part}"][i] for part in "ab")
        torch.testing.assert_close(found[key], value + 2.5 * b[rows] @ a)
        if not torch.equal(found[key], value):
            moved.add(name)
    assert moved == {"gate_proj", "up_proj", "down_proj"}
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = MoECausalLM(str(imported), lora_rank=2, lora_alpha=5.0)
    ours.configure_model()
    ours.load_state_dict(state)
    tokens = make_tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), logits_of(reloaded, tokens), atol=1e-4, rtol=1e-4)
    load_weights(saved, ours)
    other = MoECausalLM(str(imported), lora_rank=2, lora_alpha=4.0)
    other.configure_model()
    with pytest.raises(CheckpointError, match="= 2.5, and here by 2.0: give the same alpha"):
        load_weights(saved, other)


def test_what_was_learned_is_exported(rank_pool, model, imported, tmp_path):
    """Two steps of AdamW: the exported model is the one that transformers trains to."""
    saved, lr = tmp_path / "run.ckpt", 1e-3
    rank_pool.run(finetune, 2, str(imported), str(saved), 2, lr, 2)
    path = tmp_path / "out"
    run("export", saved, path, "--to", "qwen3_moe")
    trained = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    ours = trained.state_dict()
    theirs = copy.deepcopy(model).train()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            (theirs(**batch_of(rank)).loss / 2).backward()
        optimizer.step()
    for name, value in theirs.state_dict().items():
        moved, gap = (value - start[name]).abs(), (value - ours[name]).abs()
        # AdamW's first steps have the size of lr and the sign of the gradient: where that is as
        # good as zero, rounding decides. So all but a few must agree closely.
        assert moved.max() > lr, name
        assert (gap > 0.02 * lr).float().mean() < 0.02, (name, gap.max())


def test_one_file_makes_a_model(model, imported, tmp_path):
    run("consolidate", imported, tmp_path / "model.ckpt")
    loaded = MoECausalLM.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.config == MoECausalLM(str(imported)).config
    tokens = make_tokens()
    assert (logits_of(loaded, tokens) - logits_of(model, tokens)).abs().max() < TOLERANCE


def test_a_new_model_and_where_its_sizes_come_from(model, imported):
    fresh = MoECausalLM(config=str(imported.parent / "hf"))
    fresh.configure_model()
    assert fresh.network.lm_head.weight.shape == model.lm_head.weight.shape
    assert not torch.equal(fresh.network.lm_head.weight, model.lm_head.weight)
    assert "weights" not in MoECausalLM(str(imported)).hparams
    with pytest.raises(ConfigError, match="weights= .* or config="):
        MoECausalLM()
    with pytest.raises(ConfigError, match="configure_model"):
        MoECausalLM(config=fresh.config)(make_tokens())


def test_weights_that_do_not_fit(imported):
    config = dict(MoECausalLM(str(imported)).config)
    other = MoECausalLM(str(imported), {**config, "num_local_experts": 8})
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp' has 6 experts there"):
        other.configure_model()
    other = MoECausalLM(str(imported), {**config, "num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=r"only in the model: model.layers.3"):
        other.configure_model()
    other = MoECausalLM(str(imported), {**config, "vocab_size": 62})
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' has the shape \[61,"):
        other.configure_model()
    with pytest.raises(CheckpointError, match="only in the model"):
        load_weights(imported, torch.nn.Linear(3, 3))
    layer = torch.nn.Linear(3, 3)
    before = layer.weight.clone()
    load_weights(imported, layer, strict=False)
    assert torch.equal(layer.weight, before)


def test_damaged_weights(imported, tmp_path):
    path = shutil.copytree(imported, tmp_path / "a.ckpt")
    file = path / "weights_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        MoECausalLM(str(path)).configure_model()
