"""Models go to Hugging Face and back bit by bit, and compute the same there and here."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from huggingface.families import (
    CONFIGS,
    TOLERANCE,
    family_of,
    files_of,
    logits_of,
    make_model,
    make_tokens,
    same,
)

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.tools.verify import Audit
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.cli import main
from lightning_fastmoe.huggingface import Architecture, read_config
from lightning_fastmoe.huggingface.decoder import MoEDecoder


@pytest.fixture
def tokens():
    return make_tokens()


def run(*words) -> None:
    assert main(["checkpoint", *map(str, words)]) == 0


def reload(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model


def config_of(model) -> dict:
    content = model.config.to_dict()
    del content["_name_or_path"]
    return content


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name, tmp_path, tokens):
    model = make_model(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    run("import", tmp_path / "hf", tmp_path / "a.ckpt")
    assert list(Audit(tmp_path / "a.ckpt").damages()) == []
    run("export", tmp_path / "a.ckpt", tmp_path / "out", "--to", family_of(name))
    assert same(files_of(tmp_path / "hf"), files_of(tmp_path / "out"))
    again = reload(tmp_path / "out")
    assert type(again) is type(model)
    assert config_of(again) == config_of(model)
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_our_decoder_computes_the_same(name, tmp_path, tokens):
    model = make_model(name)
    model.save_pretrained(tmp_path / "hf")
    run("import", tmp_path / "hf", tmp_path / "a.ckpt", "--prefix", "")
    about = Architecture.from_config(read_config(tmp_path / "hf"))
    decoder = MoEDecoder(about)
    load_weights(tmp_path / "a.ckpt", decoder)
    expected = logits_of(model, tokens)
    assert expected.abs().max() > 1
    assert (logits_of(decoder, tokens) - expected).abs().max() < TOLERANCE
    # The tolerance tells conventions apart: the other one is far off.
    other = MoEDecoder(dataclasses.replace(about, normalize_weights=not about.normalize_weights))
    load_weights(tmp_path / "a.ckpt", other)
    assert (logits_of(other, tokens) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_other_names_and_shards(name, tmp_path, capsys):
    """An index comes with several files only; every tensor is in the file that it says."""
    model = make_model(name)
    model.save_pretrained(tmp_path / "hf")
    run("import", tmp_path / "hf", tmp_path / "a.ckpt", "--prefix", "module.net.")
    with CheckpointReader(tmp_path / "a.ckpt") as reader:
        assert "weights/module.net.model.layers.2.mlp.experts.up_proj" in reader.manifest.tensors
        assert "module.net.model.layers.2.mlp" in reader.manifest.moe_layers
    to = ["--to", name]
    run("export", tmp_path / "a.ckpt", tmp_path / "one", *to)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    capsys.readouterr()
    size = "20KB"
    run("export", tmp_path / "a.ckpt", tmp_path / "many", *to, "--max-shard-size", size, "--json")
    report = json.loads(capsys.readouterr().out)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = files_of(tmp_path / "one")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert index["weight_map"].keys() == one.keys()
    assert report["tensors"] == len(one)
    assert set(report["files"]) == {
        *index["weight_map"].values(),
        "config.json",
        "model.safetensors.index.json",
    }
    for file in set(index["weight_map"].values()):
        held = [t for n, t in one.items() if index["weight_map"][n] == file]
        assert sum(t.nbytes for t in held) <= 20_000 or len(held) == 1
    assert same(one, files_of(tmp_path / "many"))


def test_bf16_stays_bf16_unless_dtype_converts_it(tmp_path, tokens):
    """bf16 weights stay bf16 on import; --dtype converts on export."""
    model = make_model("qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path / "hf")
    run("import", tmp_path / "hf", tmp_path / "a.ckpt")
    run("export", tmp_path / "a.ckpt", tmp_path / "same", "--to", "qwen3_moe")
    assert same(files_of(tmp_path / "hf"), files_of(tmp_path / "same"))
    assert reload(tmp_path / "same").dtype == torch.bfloat16
    run("export", tmp_path / "a.ckpt", tmp_path / "f", "--to", "qwen3_moe", "--dtype", "float32")
    exact = {n: t.float() for n, t in files_of(tmp_path / "hf").items()}
    assert same(exact, files_of(tmp_path / "f"))
    assert read_config(tmp_path / "f")["dtype"] == "float32"
    decoder = MoEDecoder(Architecture.from_config(read_config(tmp_path / "hf")))
    load_weights(tmp_path / "a.ckpt", decoder, prefix="network.")
    assert decoder.lm_head.weight.dtype == torch.float32
    assert torch.equal(decoder.lm_head.weight, exact["lm_head.weight"])


def test_a_tokenizer_goes_along(tmp_path):
    model = make_model("olmoe")
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "training_args.bin").write_text("x")
    run("import", tmp_path / "hf", tmp_path / "a.ckpt")
    run("export", tmp_path / "a.ckpt", tmp_path / "o", "--to", "olmoe", "--config", tmp_path / "hf")
    found = {file.name for file in (tmp_path / "o").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_our_layer_inside_a_model_of_transformers(tmp_path, tokens):
    """The other way to train such a model: transformers' own, with this package's MoE layers."""
    from lightning_fastmoe import MoE

    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path / "hf")
    expected = logits_of(model, tokens)
    run("import", tmp_path / "hf", tmp_path / "a.ckpt", "--prefix", "")
    config = model.config
    for layer in model.model.layers:
        layer.mlp = MoE(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalize_weights=config.norm_topk_prob,
        )
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    load_weights(tmp_path / "a.ckpt", model)
    assert (logits_of(model, tokens) - expected).abs().max() < TOLERANCE
