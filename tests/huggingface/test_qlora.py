"""Experts in 4 bits, and adapters of them, against experts with the dequantised weights."""

from __future__ import annotations

import copy
import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface.experts_classes import experts_classes, make_experts, make_inputs
from huggingface.lora_runs import ALPHA, RANK, adapt, fits, reference
from huggingface.qlora_runs import (
    SCHEME,
    Packed,
    fits_from_files,
    packed,
    unpacked,
)
from huggingface.sharding_runs import Run, assert_close, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightning_fastmoe import SparseUpdate
from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.cli.entry import main
from lightning_fastmoe.errors import ConfigError, MissingPackageError, UnmanagedExpertsError
from lightning_fastmoe.huggingface import (
    add_lora,
    dequantize_experts,
    from_pretrained,
    load_adapters,
    merge_lora,
    nf4,
    quantize_experts,
)
from lightning_fastmoe.huggingface.sharded_experts import kind

CLASSES = ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"]
IDS = torch.arange(3, 20)[None]


def in_a_model(experts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})


def random_b(model: nn.Module) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("_lora_b"):
            nn.init.normal_(parameter, std=0.3)


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_same(found: Any, wanted: Any) -> None:
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.equal(found[1][name], gradient), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("scheme", list(nf4.SCHEMES))
@pytest.mark.parametrize("name", [name for name in CLASSES if name in experts_classes()])
def test_outputs_and_gradients_are_those_of_dequantised_weights(name: str, scheme: str) -> None:
    """Bit for bit, in fp64; without adapters, too, where nothing but the input has a gradient."""
    experts = make_experts(experts_classes()[name])
    before = {n: p.detach().clone() for n, p in experts.named_parameters()}
    quantize_experts(in_a_model(experts), scheme)
    twin = copy.deepcopy(experts)
    assert dequantize_experts(in_a_model(twin)) == 1
    assert {n: p.shape for n, p in twin.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    for key, parameter in twin.named_parameters():
        if key.endswith("bias"):
            assert torch.equal(parameter, before[key])
        else:
            error = (parameter - before[key]).norm() / before[key].norm()
            assert 0.01 < error < 0.12, key
    x, ids, weights = make_inputs()
    for adapters in (False, True):
        results = []
        for one in (experts, twin):
            if adapters:
                torch.manual_seed(1)
                add_lora(in_a_model(one), RANK, ALPHA)
                random_b(one)
            leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            leaves += [p for p in one.parameters() if p.requires_grad]
            out = one(leaves[0], ids, leaves[1])
            upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
            with torch.no_grad():
                results[-1].append(one(x, ids, weights))
        assert len(results[0]) == (8 if adapters else 4)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_models_passes_under_checkpointing_autocast_and_compile() -> None:
    model, twin = packed(Run("qwen3_moe")).train(), unpacked(Run("qwen3_moe")).train()
    wanted = loss_and_gradients(twin)
    assert_same(loss_and_gradients(model), wanted)
    assert len(wanted[1]) == 9
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_same(loss_and_gradients(model), wanted)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(loss_and_gradients(model), loss_and_gradients(twin))
    compiled = copy.deepcopy(model)
    compiled.model.layers[1].mlp.compile(backend="eager")
    assert_same(loss_and_gradients(compiled), wanted)
    # Scales are no floating-point numbers that a conversion would round.
    kept = {n: p.clone() for n, p in model.named_parameters() if nf4.MARK in n}
    assert_same(loss_and_gradients(model.bfloat16()), loss_and_gradients(twin.bfloat16()))
    assert len(kept) == 12
    for name, parameter in model.named_parameters():
        assert name not in kept or torch.equal(parameter, kept[name])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_more_than_one_projection_of_one_layer_is_whole(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(Run("qwen3_moe")).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    made: list[tuple[weakref.ref[torch.UntypedStorage], int]] = []
    peaks = []
    real = nf4.dequantise

    def live() -> int:
        return sum(size for one, size in made if one() is not None)

    def dequantise(*arguments: Any) -> torch.Tensor:
        stack = real(*arguments)
        made.append((weakref.ref(stack.untyped_storage()), stack.untyped_storage().nbytes()))
        peaks.append(live())
        return stack

    monkeypatch.setattr(nf4, "dequantise", dequantise)
    loss = model(IDS, labels=IDS, use_cache=False).loss
    assert len(made) == 4
    assert live() == 0
    loss.backward()
    # The first layer's input has no gradient unless it is checkpointed, so one is not made again.
    assert len(made) == (12 if checkpointing else 7)
    assert max(peaks) == 8 * 24 * 16 * 4  # gate_up_proj of one layer in fp32
    assert live() == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_quantised_while_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of a model that was read whole, with one stack in memory at a time."""
    make_model(Run(name)).save_pretrained(tmp_path)
    whole = from_pretrained(tmp_path, dtype=torch.bfloat16)
    quantize_experts(whole, SCHEME)
    stacks: list[weakref.ref[torch.UntypedStorage]] = []
    real = nf4.quantise

    def quantise(stack: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
        stacks.append(weakref.ref(stack.untyped_storage()))
        assert sum(one() is not None for one in stacks) == 1
        assert stack.dtype == torch.bfloat16
        assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"  # else threads would read ahead
        return real(stack, *arguments)

    monkeypatch.setattr(nf4, "quantise", quantise)
    model = from_pretrained(tmp_path, dtype=torch.bfloat16, quantize_experts=SCHEME)
    assert len(stacks) == 4
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(key)), key
        assert not parameter.requires_grad
    assert_same(loss_and_gradients(adapt(model)), loss_and_gradients(adapt(whole)))


SAVING = Run(world=2, ep=2, stage=2, accumulate=2, steps=4)


def check_steps(
    found: list[dict[str, torch.Tensor]], steps: list[dict[str, torch.Tensor]], model: Any
) -> None:
    """Compares the weights after steps with those of the dequantised model.

    Args:
        found: of ``model``, after it was trained.
        steps: of the dequantised model.
        model: before training.
    """
    assert len(found) == len(steps)
    for own, twin in zip(found, steps, strict=True):
        assert own.keys() == dict(model.named_parameters()).keys()
        for key, parameter in model.named_parameters():
            if nf4.MARK in key:
                assert torch.equal(own[key], parameter), key
                continue
            assert_close(own[key], twin[key], key)
            assert torch.equal(own[key], parameter) != parameter.requires_grad, key


@pytest.mark.parametrize(("name", "stage"), [("qwen3_moe", 2), ("gpt_oss", 3)])
def test_trained_sharded_resumed_and_merged(
    name: str, stage: int, rank_pool, tmp_path: Path
) -> None:
    """As one process trains the dequantised model; what is in 4 bits stays bit for bit."""
    run = replace(SAVING, name=name, stage=stage)
    expected = reference(run, unpacked(run))
    path = tmp_path / "first.ckpt"
    for weights in rank_pool.run(fits, 2, run, 2, path, None, True, Packed):
        check_steps(weights, expected[:2], packed(run))
    with CheckpointReader(path) as reader:
        record = reader.record("weights/net.model.layers.0.mlp.experts.down_proj_nf4")
        assert (record.shape, record.dtype) == ((8 if name == "qwen3_moe" else 4, 96), "U8")
    alone = replace(run, world=1, ep=1, stage=1, accumulate=4)
    (weights,) = rank_pool.run(fits, 1, alone, 4, tmp_path / "one.ckpt", path, False, Packed)
    check_steps(weights, expected[2:], packed(run))

    merged = packed(run)
    adapters = {n: weight for n, weight in expected[1].items() if n in merged.state_dict()}
    assert merged.load_state_dict(adapters, strict=False).unexpected_keys == []
    assert merge_lora(merged) == 2
    command = ["checkpoint", "export", str(path), str(tmp_path / "again")]
    command += ["--config", str(path.with_suffix(".model"))]
    assert main(command) == 0
    for folder in (path.with_suffix(".model"), tmp_path / "again"):
        written = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for key, weight in written.named_parameters():
            wanted = merged.get_parameter(key)
            if "_proj" in key and ".experts." in key and not key.endswith("bias"):
                assert torch.equal(weight, weight.bfloat16().float())
                torch.testing.assert_close(weight, wanted, rtol=2**-8, atol=1e-6)
            else:
                assert_close(weight, wanted, key)


def test_each_rank_reads_and_quantises_its_own_and_saves_adapters(
    rank_pool, tmp_path: Path
) -> None:
    """Adapters alone are saved, resumed on other ranks, and what PEFT and this package load."""
    run = replace(SAVING, stage=3, extra={"exclude_frozen_parameters": True})
    base, folders = tmp_path / "base", [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    make_model(run).save_pretrained(base)
    model, twin = packed(run), unpacked(run)
    for one in (model, twin):
        one.lm_head.weight.requires_grad_(False)
    expected = reference(run, twin)
    found = rank_pool.run(fits_from_files, 2, run, base, folders[0])
    other = replace(run, ep=1)
    found += rank_pool.run(fits_from_files, 2, other, base, folders[1], folders[0] / "last.ckpt")
    for weights, steps in zip(found, (expected[:2],) * 2 + (expected[2:],) * 2, strict=True):
        check_steps(weights, steps, model)
    with CheckpointReader(folders[0] / "last.ckpt") as reader:
        kept = {n.removeprefix("weights/net.") for n in reader.manifest.tensors if "weights/" in n}
    assert kept == {n for n, p in model.named_parameters() if p.requires_grad}

    want = twin.eval()(IDS, use_cache=False).logits  # after its last step
    dense = make_model(run, "eager")
    for key, parameter in unpacked(run).named_parameters():
        if "_lora_" not in key:
            dense.get_parameter(key).data.copy_(parameter)
    assert (dense.eval()(IDS, use_cache=False).logits - want).abs().max() > 0.01
    theirs = PeftModel.from_pretrained(dense, folders[1] / "adapters").eval()
    assert_close(theirs(IDS, use_cache=False).logits, want, "PEFT")
    again = from_pretrained(base, quantize_experts=SCHEME)
    load_adapters(again, folders[1] / "adapters")
    assert_close(again.eval()(IDS, use_cache=False).logits, want, "loaded again")


def test_linear_layers_in_4_bits_beside_them(tmp_path: Path) -> None:
    """Those of transformers' BitsAndBytesConfig, with adapters of PEFT."""
    import bitsandbytes as bnb

    run = Run("qwen3_moe", sizes={"hidden_size": 64, "head_dim": 32})
    make_model(run).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = from_pretrained(tmp_path, quantize_experts=SCHEME, quantization_config=config)
    twin = from_pretrained(tmp_path, quantize_experts=SCHEME)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(linear) == 8
    with torch.no_grad():
        for name, layer in linear.items():
            made = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            twin.get_submodule(name).weight.copy_(made)
    results = []
    for one in (model, twin):
        torch.manual_seed(0)
        wrapped = get_peft_model(one, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        add_lora(wrapped, RANK, ALPHA)
        random_b(wrapped)
        results.append(loss_and_gradients(wrapped.train()))
    found, wanted = results
    assert len(wanted[1]) == 16
    assert_close(found[0], wanted[0], "loss")
    for name, gradient in wanted[1].items():
        assert_close(found[1][name], gradient, name)


def test_what_can_not_be_quantised() -> None:
    with pytest.raises(ConfigError, match="'int4': choose 'nf4' or 'nf4-double'"):
        quantize_experts(make_model(Run("mixtral")), "int4")
    with pytest.raises(ConfigError, match="Linear.*has no stacked experts"):
        quantize_experts(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="'eager', which can't compute in 4 bits"):
        quantize_experts(make_model(Run("mixtral"), "eager"))
    with pytest.raises(ConfigError, match="Call quantize_experts before add_lora"):
        quantize_experts(adapt(make_model(Run("mixtral"))))
    with torch.device("meta"):
        model = make_model(Run("mixtral"))
    with pytest.raises(ConfigError, match="gate_up_proj has no memory yet"):
        quantize_experts(model)
    model = make_model(Run("mixtral"))
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(ConfigError, match=r"layers.1.mlp.experts.down_proj: weights with NaN"):
        quantize_experts(model)
    model = make_model(Run("mixtral"))
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), False)
    with pytest.raises(ConfigError, match=r"down_proj is quantised by another .*torch.int8"):
        quantize_experts(model)
    model = make_model(Run("mixtral"))
    SparseUpdate(experts=[0], dense=False).apply(model)
    with pytest.raises(ConfigError, match="SparseUpdate trains single experts"):
        quantize_experts(model)


def test_what_experts_in_4_bits_refuse(tmp_path: Path) -> None:
    model = make_model(Run("mixtral"))
    quantize_experts(model)
    assert not any(p.requires_grad for p in model.parameters())
    # Whole stacks, which a schedule would keep until its backward pass.
    assert [layer.experts.fused_stacks(torch.float32) for _, layer in kind.layers(model)] == [
        None
    ] * 2
    with pytest.raises(ConfigError, match=r"layers.0.mlp.experts is quantised already \(nf4\)"):
        quantize_experts(model, "nf4-double")
    with pytest.raises(ConfigError, match="4 bits can't be trained themselves. Train adapters"):
        model.requires_grad_(True)
    for part in (model, model.model):
        with pytest.raises(ConfigError, match="4 bits would write names that no loader knows"):
            part.save_pretrained(tmp_path / "not")
    assert not (tmp_path / "not").exists()
    model.set_experts_implementation("eager")
    with pytest.raises(ConfigError, match="in 4 bits, which experts_implementation='eager'"):
        model(IDS)
    model.set_experts_implementation("fastmoe")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="are quantised .torch.int32, torch.uint8.* add_lora"):
        SparseUpdate(experts=[0], dense=False).apply(model)
    add_lora(model, RANK)
    random_b(model)
    with pytest.raises(ConfigError, match="has adapters. Call merge_lora"):
        dequantize_experts(model)
    experts = model.model.layers[0].mlp.experts
    whole = experts.down_proj_nf4.data
    experts.down_proj_nf4.data = whole.flatten()[:0]  # as ZeRO 3 leaves it outside of passes
    with pytest.raises(UnmanagedExpertsError, match="down_proj of MixtralExperts is not gathered"):
        model(IDS)
    experts.down_proj_nf4.data = whole
    expected = model(IDS, use_cache=False).logits
    assert merge_lora(model) == 2
    assert_close(model(IDS, use_cache=False).logits, expected, "merged")
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again.set_experts_implementation("eager")
    assert_close(again(IDS, use_cache=False).logits, expected, "saved")


def test_files_that_can_not_be_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(Run("mixtral")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'int4': choose"):
        from_pretrained(tmp_path, quantize_experts="int4")
    other = transformers.FineGrainedFP8Config()
    with pytest.raises(ConfigError, match="FineGrainedFP8Config.: it might quantise the experts"):
        from_pretrained(tmp_path, quantize_experts="nf4", quantization_config=other)
    config = json.loads((tmp_path / "config.json").read_text())
    changed = config | {"intermediate_size": 20}
    linear = transformers.BitsAndBytesConfig(load_in_4bit=True)
    for options in ({}, {"quantization_config": linear}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=r"gate_up_proj.*\(4, 24, 16\).* not \(4, 40, 16\)"):
            from_pretrained(tmp_path, quantize_experts="nf4", **options)
    changed = config | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="are quantised already .* weights of 16 bits or more"):
        from_pretrained(tmp_path, quantize_experts="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(MissingPackageError, match=r"lightning-fastmoe\[qlora\]"):
        quantize_experts(make_model(Run("mixtral")))
