"""What can't be exported or imported faithfully is refused, by name, and nothing is left behind."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from checkpoint.samples import write_sample
from huggingface.families import CONFIGS, make_model
from safetensors.torch import load_file, save_file

from lightning_fastmoe.cli import main
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import FAMILIES, Architecture
from lightning_fastmoe.huggingface.architecture import file_tensors, weight_shapes


@pytest.fixture(scope="module")
def model():
    return make_model("mixtral")


@pytest.fixture
def source(model, tmp_path):
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    return tmp_path / "hf"


@pytest.fixture
def checkpoint(source, tmp_path):
    assert main(["checkpoint", "import", str(source), str(tmp_path / "a.ckpt")]) == 0
    return tmp_path / "a.ckpt"


def refused(capsys, status, match, *words) -> None:
    capsys.readouterr()
    assert main(["checkpoint", *map(str, words)]) == status
    error = capsys.readouterr().err
    assert match in error, error


def change_config(source, **values) -> None:
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, **values}))


def last_file(source):
    index = json.loads((source / "model.safetensors.index.json").read_text())
    return source / index["weight_map"]["lm_head.weight"]


# ----------------------------------------------------------------------------------------- config


def test_defaults_are_those_of_transformers():
    """What a config.json leaves out means the same here as there."""
    for name, kind in (
        ("mixtral", transformers.MixtralConfig),
        ("qwen3_moe", transformers.Qwen3MoeConfig),
        ("olmoe", transformers.OlmoeConfig),
    ):
        whole = json.loads(kind().to_json_string(use_diff=False))
        assert Architecture.from_config({"model_type": name}) == Architecture.from_config(whole)
        assert FAMILIES[name].architecture.startswith(kind.__name__.removesuffix("Config"))


def test_fields_under_the_names_of_transformers_4():
    kind, sizes = CONFIGS["qwen3_moe"]
    new = json.loads(getattr(transformers, kind)(**sizes).to_json_string())
    old = dict(new)
    old["num_experts"] = old.pop("num_local_experts")
    old["rope_theta"] = old.pop("rope_parameters")["rope_theta"]
    assert Architecture.from_config(old) == Architecture.from_config(new)
    assert Architecture.from_config({**old, "rope_theta": 7.0}).rope_theta == 7.0


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=True"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"num_experts": 9}, "num_experts and num_local_experts differ"),
        ({"hidden_size": "wide"}, "wrong type"),
        ({"num_attention_heads": 0}, "wrong type"),
    ],
)
def test_models_that_we_can_not_be(source, tmp_path, capsys, values, match):
    change_config(source, **values)
    refused(capsys, 2, match, "import", source, tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


def test_fields_of_other_families_mean_nothing():
    """transformers ignores them, too."""
    plain = {"model_type": "mixtral"}
    others = {"clip_qkv": 1.0, "mlp_only_layers": [0], "norm_topk_prob": False}
    assert Architecture.from_config({**plain, **others}) == Architecture.from_config(plain)
    about = Architecture.from_config({"model_type": "qwen3_moe", **others})
    assert about.clip_qkv is None
    assert set(about.dense_layers) == {0}
    assert Architecture.from_config({"model_type": "olmoe", **others}).clip_qkv == 1.0


def test_a_window_that_is_switched_off():
    about = {"model_type": "qwen3_moe", "sliding_window": 4096, "use_sliding_window": False}
    Architecture.from_config(about)
    with pytest.raises(ConfigError, match="sliding_window=4096"):
        Architecture.from_config({**about, "use_sliding_window": True})


def test_file_tensors_cover_our_weights_exactly():
    for name in FAMILIES:
        about = Architecture.from_config(
            {"model_type": name, "num_hidden_layers": 2, "num_experts": 3}
        )
        ends: dict[str, int] = {}
        for tensor in file_tensors(about):
            assert tensor.start == ends.get(tensor.name, 0)
            ends[tensor.name] = tensor.start + torch.Size(tensor.shape).numel()
        assert ends == {n: torch.Size(s).numel() for n, s in weight_shapes(about).items()}


# ----------------------------------------------------------------------------------------- import


def test_a_tensor_too_few_too_many_or_of_another_shape(source, tmp_path, capsys):
    file = last_file(source)
    tensors = load_file(file)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, file)
    refused(capsys, 2, "lack lm_head.weight", "import", source, tmp_path / "b")
    save_file({**tensors, "lm_head.weight": head, "lora.A": head.clone()}, file)
    refused(capsys, 2, "also hold lora.A", "import", source, tmp_path / "b")
    save_file({**tensors, "lm_head.weight": head.T.contiguous()}, file)
    refused(capsys, 2, "lm_head.weight has shape [32, 61]", "import", source, tmp_path / "b")
    save_file({**tensors, "lm_head.weight": head.to(torch.complex64)}, file)
    refused(capsys, 2, "lm_head.weight has dtype C64", "import", source, tmp_path / "b")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, "lm_head.weight": head, **inv_freq}, file)
    assert main(["checkpoint", "import", str(source), str(tmp_path / "b")]) == 0


def test_experts_of_two_dtypes(source, tmp_path, capsys):
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors = load_file(source / index[name])
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, source / index[name])
    refused(capsys, 2, "different dtypes", "import", source, tmp_path / "b.ckpt")


def test_files_that_are_cut_missing_or_elsewhere(source, tmp_path, capsys):
    file = last_file(source)
    os.truncate(file, file.stat().st_size - 1)
    refused(capsys, 3, file.name, "import", source, tmp_path / "b.ckpt")
    file.unlink()
    refused(capsys, 3, file.name, "import", source, tmp_path / "b.ckpt")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused(capsys, 2, "outside this directory", "import", source, tmp_path / "b.ckpt")
    index.write_text("[]")
    refused(capsys, 2, "is not an index", "import", source, tmp_path / "b.ckpt")
    index.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    refused(capsys, 2, "pickle files", "import", source, tmp_path / "b.ckpt")
    (source / "config.json").unlink()
    refused(capsys, 2, "config.json can't be read", "import", source, tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


def test_a_tensor_in_two_files(source, tmp_path, capsys):
    file = last_file(source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    save_file(load_file(file), source / "again.safetensors")
    index["weight_map"]["x"] = "again.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, 3, "remove one of them", "import", source, tmp_path / "b.ckpt")


# ----------------------------------------------------------------------------------------- export


def test_another_family_or_other_sizes(source, checkpoint, tmp_path, capsys):
    export = ["export", checkpoint, tmp_path / "o", "--to"]
    refused(capsys, 2, "model_type='mixtral'", *export, "olmoe")
    change_config(source, intermediate_size=25)
    wrong = "mlp.experts.up_proj has shape [4, 48, 32], not [4, 50, 32]"
    refused(capsys, 2, wrong, *export, "mixtral", "--config", source)
    change_config(source, intermediate_size=24, num_hidden_layers=2)
    refused(capsys, 2, "is not in that model", *export, "mixtral", "--config", source)
    change_config(source, num_hidden_layers=4)
    refused(capsys, 2, "is missing", *export, "mixtral", "--config", source / "config.json")
    refused(capsys, 2, "is missing", *export, "mixtral", "--prefix", "net")
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_of_something_else(tmp_path, source, capsys):
    other = write_sample(tmp_path / "c.ckpt")
    refused(capsys, 2, "Pass --config", "export", other, tmp_path / "o", "--to", "mixtral")
    command = ["export", other, tmp_path / "o", "--to", "mixtral", "--config", source]
    refused(capsys, 2, "no weight called PREFIXmodel.embed_tokens.weight", *command)


def test_what_is_there_is_kept(checkpoint, source, tmp_path, capsys):
    (tmp_path / "o").mkdir()
    export = ["export", checkpoint, tmp_path / "o", "--to", "mixtral"]
    refused(capsys, 2, "exists already", *export)
    refused(capsys, 2, "--overwrite", "import", source, checkpoint)
    assert main(["checkpoint", "import", str(source), str(checkpoint), "--overwrite"]) == 0


def test_a_damaged_checkpoint(checkpoint, tmp_path, capsys):
    file = checkpoint / "weights_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(capsys, 3, "is damaged", "export", checkpoint, tmp_path / "o", "--to", "mixtral")
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "hf"]
