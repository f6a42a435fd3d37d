"""Adapters of stacked experts against experts whose weights have them merged in."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface.experts_classes import experts_classes, make_experts, make_inputs
from huggingface.lora_runs import (
    ALPHA,
    RANK,
    adapted,
    adapted_by_peft_alone,
    adapted_by_peft_too,
    fits,
    reference,
    saves_adapters,
    saves_adapters_of_attention,
    saves_adapters_of_both,
    saves_beside_heads,
)
from huggingface.sharding_runs import Run, assert_close, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.cli.entry import main
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import add_lora, load_adapters, merge_lora
from lightning_fastmoe.huggingface.experts_class import projections
from lightning_fastmoe.huggingface.peft_modules import linear_adapters
from lightning_fastmoe.nn.expert_layers import expert_layers

CLASSES = ["Qwen3MoeExperts", "MixtralExperts", "GptOssExperts", "NemotronHExperts"]
CLASSES += ["DeepseekV4Experts", "Gemma4TextExperts", "Phi3MoeExperts", "MiniMaxM3VLExperts"]


def in_a_model(experts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})


@pytest.mark.parametrize("name", [name for name in CLASSES if name in experts_classes()])
def test_outputs_and_gradients_are_those_of_merged_weights(name: str) -> None:
    kind = experts_classes()[name]
    experts, twin = make_experts(kind), make_experts(kind, implementation="eager")
    twin.load_state_dict(experts.state_dict())
    added = add_lora(in_a_model(experts), RANK, ALPHA)
    assert len(added) == 4
    trained = {n: p for n, p in experts.named_parameters() if p.requires_grad}
    assert sorted(f"mlp.experts.{n}" for n in trained) == sorted(added)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.3)
    leaves = [*trained.values()]
    x, *routing = make_inputs()
    x = x.requires_grad_()
    got = experts(x, *routing)
    merged = {}
    for projection in projections(experts):
        a, b = (trained[f"{projection}_lora_{part}"] for part in "ab")
        added = torch.einsum("eor,eri->eoi", b, a) * ALPHA / RANK
        weight = getattr(twin, projection).detach()
        merged[projection] = weight + (added.mT if experts.is_transposed else added)
    want = functional_call(twin, merged, (x, *routing))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(want)
    found = torch.autograd.grad(got, [x, *leaves], upstream)
    for a, b in zip(found, torch.autograd.grad(want, [x, *leaves], upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        assert b.abs().sum() > 0
    # Merged, the class's own code computes the same again.
    assert merge_lora(in_a_model(experts)) == 1
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(experts(x, *routing), want, rtol=1e-11, atol=1e-11)
    assert [n for n, _ in experts.named_parameters()] == [n for n, _ in twin.named_parameters()]


def test_a_new_adapter_changes_nothing_and_freezes_the_rest() -> None:
    model = make_model(Run("qwen3_moe"))
    ids = torch.arange(3, 20)[None]
    before = model(ids, use_cache=False).logits
    names = add_lora(model, 8, also_train=["lm_head.weight", "model.norm.weight"])
    assert len(names) == 8
    torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=1e-5, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*names, "lm_head.weight", "model.norm.weight"}
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_one_seed_gives_each_expert_its_adapter() -> None:
    """Whichever other experts the rank holds."""
    kept = []
    for ids in (range(8), (2, 3)):
        model = make_model(Run("qwen3_moe"))
        layers = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
        for _, layer in expert_layers(model):
            layer.experts.keep(ids)
        torch.manual_seed(3)
        add_lora(model, 4)
        kept.append([layer.gate_up_proj_lora_a.detach() for layer in layers])
    for whole, own in zip(*kept, strict=True):
        assert torch.equal(whole[2:4], own)
    assert not torch.equal(*kept[0])


def test_other_implementations_are_refused() -> None:
    model = adapted(Run("mixtral"))
    ids = torch.arange(3, 9)[None]
    model.set_experts_implementation("eager")
    with pytest.raises(ConfigError, match="has adapters, which experts_implementation='eager'"):
        model(ids, use_cache=False)
    merge_lora(model)
    model(ids, use_cache=False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"rank": True}, "rank=True must be"),
        ({"rank": 4, "alpha": -1.0}, "alpha=-1.0 must be a positive number"),
        ({"rank": 4, "alpha": "8"}, "alpha='8' must be a positive number"),
        ({"rank": 4, "also_train": "lm_head"}, "also_train='lm_head' must be a list"),
        ({"rank": 4, "also_train": ["head.weight"]}, "'head.weight', which fits no parameter"),
    ],
)
def test_arguments(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        add_lora(make_model(Run("mixtral")), **arguments)


def test_weights_without_memory_are_refused() -> None:
    with torch.device("meta"):
        model = make_model(Run("mixtral"))
    with pytest.raises(ConfigError, match="gate_up_proj has no memory yet"):
        add_lora(model, 4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_that_can_not_have_adapters() -> None:
    with pytest.raises(ConfigError, match="Linear.*has no stacked experts"):
        add_lora(nn.Linear(2, 2), 4)
    with pytest.raises(ConfigError, match="'eager', which would ignore adapters"):
        add_lora(make_model(Run("mixtral"), "eager"), 4)
    model = adapted(Run("mixtral"))
    with pytest.raises(ConfigError, match="layers.0.mlp.experts has adapters already"):
        add_lora(model, 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_quantised_experts_are_refused(projection: str, dtype: torch.dtype) -> None:
    """Before anything is frozen or added."""
    model = make_model(Run("qwen3_moe"))
    experts = model.model.layers[1].mlp.experts
    quantised = getattr(experts, projection).detach().to(dtype)
    setattr(experts, projection, nn.Parameter(quantised, requires_grad=False))
    reason = rf"layers.1.mlp.experts.{projection} is quantised \({dtype}\)"
    with pytest.raises(ConfigError, match=reason):
        add_lora(model, 4)
    assert not any("_lora_" in name for name, _ in model.named_parameters())
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_transformers_saves_a_model_with_adapters_only_when_merged(
    name: str, tmp_path: Path
) -> None:
    """It would split adapters as if they were experts' weights, and drop them when it loads."""
    model = copy.deepcopy(adapted(Run(name)))
    for part in (model, model.model):
        with pytest.raises(ConfigError, match="Call merge_lora"):
            part.save_pretrained(tmp_path / "not")
        with pytest.raises(ConfigError, match="Call merge_lora"):
            part.push_to_hub("not/pushed")
    assert not (tmp_path / "not").exists()
    merge_lora(model)
    ids = torch.arange(3, 20)[None]
    expected = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "merged")
    assert "save_pretrained" not in {*vars(model), *vars(model.model)}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", experts_implementation="fastmoe"
    )
    for key, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[key]), key
    assert torch.equal(again(ids, use_cache=False).logits, expected)


SAVING = Run(world=2, ep=2, stage=2, accumulate=2, steps=4)
TOPOLOGIES = {
    "1 rank": replace(SAVING, world=1, ep=1, stage=1, accumulate=4),
    "4 ranks": replace(SAVING, world=4, ep=4, stage=3, accumulate=1),
    "replicas": replace(SAVING, world=4, ep=2, stage=3, accumulate=1),
}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_trained_sharded_resumed_and_merged(name: str, rank_pool, tmp_path: Path, capsys) -> None:
    """On any topology as in one process; what is frozen stays bit for bit."""
    saving = replace(SAVING, name=name)
    expected = reference(saving)
    before = {n: p.detach() for n, p in adapted(saving).named_parameters()}
    trained = {n for n in before if "_lora_" in n} | {"lm_head.weight"}

    def check(found: list[dict[str, torch.Tensor]], steps: list[dict[str, torch.Tensor]]) -> None:
        for own, twin in zip(found, steps, strict=True):
            assert own.keys() == twin.keys()
            for key, weight in twin.items():
                if key in trained:
                    assert_close(own[key], weight, key)
                    assert not torch.equal(own[key], before[key])
                else:
                    assert torch.equal(own[key], before[key]), key

    path = tmp_path / "first.ckpt"
    adapters_alone = replace(saving, extra={"exclude_frozen_parameters": True})
    rank_pool.run(fits, 2, adapters_alone, 2, tmp_path / "small.ckpt", None, True)
    with CheckpointReader(tmp_path / "small.ckpt") as reader:
        kept = {n.removeprefix("weights/net.") for n in reader.manifest.tensors if "weights/" in n}
    assert kept == trained
    for weights in rank_pool.run(fits, 2, saving, 2, path, None, True):
        check(weights, expected[:2])
    with CheckpointReader(path) as reader:
        shape = reader.record("weights/net.model.layers.0.mlp.experts.down_proj_lora_a").shape
    assert shape == ((8 if name == "qwen3_moe" else 4), RANK, 12)
    for what, run in TOPOLOGIES.items():
        run = replace(run, name=name)
        if what == "4 ranks":  # the rest of the model is as it was loaded
            run = replace(run, extra=adapters_alone.extra)
            path = tmp_path / "small.ckpt"
        for weights in rank_pool.run(fits, run.world, run, 4, tmp_path / f"{what}.ckpt", path):
            check(weights, expected[2:])

    merged = adapted(saving)
    merged.load_state_dict(expected[1])
    assert merge_lora(merged) == 2
    path = tmp_path / "first.ckpt"
    command = ["checkpoint", "export", str(path), str(tmp_path / "again")]
    command += ["--config", str(tmp_path / "first.model")]
    assert main([*command, "--lora-scale", "2"]) != 0
    assert "--lora-scale 2.0 is not the 1.5" in capsys.readouterr().err
    assert main(command) == 0  # the checkpoint says it
    for folder in ("first.model", "small.model", "again"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, experts_implementation="eager"
        )
        for key, weight in model.named_parameters():
            assert_close(weight, merged.get_parameter(key), key)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_files_of_peft(name: str, rank_pool, tmp_path: Path) -> None:
    """They hold what PEFT's get_delta_weight makes of them, and are read again by any rank."""
    run, folder = replace(SAVING, name=name), tmp_path / "adapters"
    weights = rank_pool.run(saves_adapters, 2, run, folder)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert config["base_model_name_or_path"] == "some/model"
    assert config["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]
    files = load_file(folder / "adapter_model.safetensors")
    assert len(files) == 8
    merged = adapted(run)
    merged.load_state_dict(weights)
    before = {name: p.detach().clone() for name, p in merged.named_parameters()}
    merge_lora(merged)
    for n in (0, 1):
        experts = merged.get_submodule(f"model.layers.{n}.mlp.experts")
        for wrapper, projection in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
            key = f"base_model.model.model.layers.{n}.mlp.experts.{wrapper}lora"
            a, b = files[f"{key}_A.weight"], files[f"{key}_B.weight"]
            a = a.reshape(experts.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, experts.num_experts)
            form = "ore,eri->eio" if experts.is_transposed else "ore,eri->eoi"
            delta = torch.einsum(form, b, a) * config["lora_alpha"] / config["r"]
            start = before[f"model.layers.{n}.mlp.experts.{projection}"]
            assert_close(start + delta, getattr(experts, projection), projection)
    adapters = {name for name in weights if "_lora_" in name}
    for ids in (range(4), (1, 2)):
        again = make_model(run)
        for _, layer in expert_layers(again):
            layer.experts.keep(ids)
        load_adapters(again, folder)
        for key in adapters:
            assert torch.equal(again.get_parameter(key), weights[key][list(ids)]), key


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_peft_reads_adapters_of_experts_and_linear_layers(
    name: str, rank_pool, tmp_path: Path, capsys
) -> None:
    """Its model, the merged one and ours, loaded again, compute what was trained."""
    run = replace(SAVING, name=name)
    weights = rank_pool.run(saves_adapters_of_both, 2, run, tmp_path)[0]
    trained = adapted_by_peft_too(run)
    start = {n: p.detach().clone() for n, p in trained.named_parameters()}
    trained.load_state_dict(weights)
    moved = {n for n, p in trained.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if "lora_" in n}
    assert len([n for n in moved if "q_proj" in n]) == 4
    assert len([n for n in moved if "v_proj" in n]) == 2
    ids = torch.arange(3, 20)[None]
    want = trained(ids, use_cache=False).logits
    base = make_model(run)(ids, use_cache=False).logits
    assert (want - base).abs().max() > 0.05 * base.abs().max()

    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "model.layers.1.self_attn.v_proj"]
    theirs = PeftModel.from_pretrained(make_model(run, "eager"), tmp_path / "adapters")
    assert_close(theirs(ids, use_cache=False).logits, want, "PEFT")
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", experts_implementation="eager"
    )
    assert_close(merged(ids, use_cache=False).logits, want, "merged")

    command = ["checkpoint", "export", str(tmp_path / "last.ckpt"), str(tmp_path / "again")]
    command += ["--config", str(tmp_path / "merged"), "--lora-scale", str(ALPHA / RANK)]
    assert main(command) != 0  # the linear layers' are others
    assert "--lora-scale 1.5 is not the 2.333" in capsys.readouterr().err
    assert main(command[:-2]) == 0
    for key, value in AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict().items():
        assert torch.equal(value, merged.get_parameter(key)), key

    again = make_model(run)
    targets = {"r": 3, "lora_alpha": 7, "target_modules": config["target_modules"]}
    patterns = {"rank_pattern": {"q_proj": RANK}, "alpha_pattern": {"q_proj": ALPHA}}
    with pytest.raises(ConfigError, match=r"6 adapters of layers that have none .*q_proj"):
        load_adapters(make_model(run), tmp_path / "adapters")
    with pytest.raises(ConfigError, match=r"r=4 and lora_alpha=6.0 for .*q_proj.* model r=3 and"):
        load_adapters(get_peft_model(make_model(run), LoraConfig(**targets)), tmp_path / "adapters")
    again = get_peft_model(again, LoraConfig(**targets, **patterns))
    load_adapters(again, tmp_path / "adapters")
    for key, weight in again.named_parameters():
        assert torch.equal(weight, weights[key]), key
        assert weight.requires_grad == ("lora_" in key)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "Embedding.*only linear layers"),
    ],
)
def test_other_adapters_of_peft_are_not_saved(options: dict[str, Any], reason: str) -> None:
    plain = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    model = get_peft_model(make_model(Run("mixtral")), LoraConfig(**plain))
    assert {one.scale for one in linear_adapters(model).values()} == {2.0}
    model = get_peft_model(make_model(Run("mixtral")), LoraConfig(**plain, use_rslora=True))
    assert {one.alpha for one in linear_adapters(model).values()} == {2 * 4 / 2**0.5}
    model = get_peft_model(make_model(Run("mixtral")), LoraConfig(**plain | options))
    with pytest.raises(ConfigError, match=reason):
        linear_adapters(model)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_of_attention_alone(stage: int, rank_pool, tmp_path: Path) -> None:
    run, ids = Run("qwen3_moe", stage=stage), torch.arange(3, 27).view(2, 12)
    weights = rank_pool.run(saves_adapters_of_attention, 2, run, tmp_path)[0]
    trained = adapted_by_peft_alone(run)
    trained.load_state_dict(weights, strict=False)
    want = trained(ids, use_cache=False).logits
    assert not torch.allclose(adapted_by_peft_alone(run)(ids, use_cache=False).logits, want)
    theirs = PeftModel.from_pretrained(make_model(run, "eager"), tmp_path / "adapters")
    assert_close(theirs(ids, use_cache=False).logits, want, "PEFT")


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapters of PEFT"):
        load_adapters(make_model(Run("mixtral")), tmp_path)
    usual = {"r": 2, "lora_alpha": 4}
    for config, tensors, reason in (
        ({**usual, "use_rslora": True}, {}, "use_rslora=True is not supported"),
        ({**usual, "rank_pattern": {"gate_up_proj": 3}}, {}, "rank_pattern of 'gate_up_proj' is"),
        ({**usual, "lora_dropout": 0.1}, {}, "lora_dropout=0.1 is not supported"),
        (usual, {}, "has no base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file({"x": torch.zeros(1), **tensors}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=reason):
            load_adapters(make_model(Run("mixtral")), tmp_path)


@pytest.mark.parametrize(
    ("changes", "cut", "reason"),
    [
        ({"peft_type": "IA3"}, None, "peft_type='IA3' is not supported"),
        ({"use_qalora": True}, None, "use_qalora=True is not supported"),
        ({"layer_replication": [[0, 2]]}, None, "layer_replication=.* is not supported"),
        ({"r": None}, None, "has no r"),
        ({"r": 4}, None, r"lora_A.weight has shape \(8, 16\), not \(16, 16\), for r=4"),
        ({"r": 3}, None, r"lora_A.weight has shape \(8, 16\), not \(12, 16\), for r=3"),
        ({}, ("layers.1", 0, 4), r"layers.1.*lora_A.weight has shape \(4, 16\), not \(8, 16\)"),
        ({}, ("lora_B", 1, 4), r"lora_B.weight has shape \(24, 4\), not \(24, 8\)"),
        ({}, ("layers.1", 0, 0), "has no .*layers.1.mlp.experts.base_layer.lora_A.weight"),
        ({}, ("q_proj", 0, 4), "1 adapters of layers that have none .*q_proj"),
    ],
)
def test_files_are_checked_before_the_model_changes(
    changes: dict[str, Any], cut: tuple[str, int, int] | None, reason: str, tmp_path: Path
) -> None:
    """Of the tensors whose names have a part, ``cut`` keeps so many rows or columns, or none."""
    sizes = {"base_layer.lora_A": (8, 16), "base_layer.lora_B": (24, 8)}
    sizes |= {"lora_A": (8, 12), "lora_B": (16, 8)}
    start = "base_model.model.model.layers"
    tensors = {
        f"{start}.{n}.mlp.experts.{name}.weight": torch.randn(size)
        for n in (0, 1)
        for name, size in sizes.items()
    }
    usual: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    config = {key: value for key, value in (usual | changes).items() if value is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(usual))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    load_adapters(make_model(Run("mixtral")), tmp_path)  # but for the changes it fits
    if cut is not None:
        part, dim, length = cut
        if part == "q_proj":
            tensors[f"{start}.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
        found = [key for key in tensors if part in key]
        for key in found:
            tensors[key] = tensors[key].narrow(dim, 0, length).contiguous()
            if not length:
                del tensors[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = make_model(Run("mixtral"))
    with pytest.raises(ConfigError, match=reason):
        load_adapters(model, tmp_path)
    assert not any("_lora_" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_trained_beside_the_model_is_named(rank_pool, tmp_path: Path) -> None:
    first, second = rank_pool.run(saves_beside_heads, 2, Run(), tmp_path)
    assert second == []
    for said, what in zip(first, ("save_adapters", "save_pretrained"), strict=True):
        assert said == (
            f"{what} writes net alone: also trained, and not written, are value_head.weight,"
            " value_head.bias. Checkpoints have them: trainer.save_checkpoint(path)."
        )
