"""Experts in 4 bits on a GPU: the format, the layer, its memory, and a fine-tuning run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.closeness import host_never_waits
from torch import nn

from lightning_fastmoe.testing import RankPool

pytest.importorskip("bitsandbytes", reason="experts in 4 bits need bitsandbytes")
transformers: Any = pytest.importorskip("transformers")
experts_classes: Any = pytest.importorskip("huggingface.experts_classes")
lora_runs: Any = pytest.importorskip("huggingface.lora_runs")
runs: Any = pytest.importorskip("huggingface.qlora_runs")
sharding_runs: Any = pytest.importorskip("huggingface.sharding_runs")

NAMES = ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"]
SCHEMES = ["nf4", "nf4-double"]
SHARED = {} if torch.cuda.device_count() >= 2 else {"nodes": 2, "shared_gpu": True}
RUN = sharding_runs.Run(world=2, ep=2, accumulate=2, steps=2)


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    wanted = expected.detach().double().cpu()
    error = (actual.detach().double().cpu() - wanted).norm()
    return float(error / wanted.norm().clamp_min(1e-12))


def in_a_model(experts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_makes_of_the_same_bits_what_the_cpu_makes(scheme: str) -> None:
    """Where it quantises, it may decide otherwise between two levels that are as near."""
    from lightning_fastmoe.huggingface import nf4

    torch.manual_seed(0)
    stack = torch.randn(5, 130, 130)
    on_cpu = nf4.quantise(stack, scheme)
    on_gpu = nf4.quantise(stack, scheme, torch.device("cuda"))
    assert all(tensor.device.type == "cpu" for tensor in on_gpu)
    assert (on_cpu[0] != on_gpu[0]).float().mean() < 1e-3
    exact = nf4.dequantise(on_gpu, (130, 130), torch.float32)
    moved = [tensor.cuda() for tensor in on_gpu]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = nf4.dequantise(moved, (130, 130), dtype)
        assert found.dtype == dtype
        limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(found.cpu().float(), exact, rtol=limit, atol=1e-7)
    step = nf4._ELEMENTS
    try:
        nf4._ELEMENTS = 40000
        assert torch.equal(nf4.dequantise(moved, (130, 130), torch.float16), found)
    finally:
        nf4._ELEMENTS = step
    error = relative(exact, nf4.dequantise(on_cpu, (130, 130), torch.float32))
    assert error < 0.01


def make(name: str, dtype: torch.dtype, scheme: str) -> tuple[Any, Any, Any]:
    """Experts in 4 bits with adapters on the GPU, a twin with their values, and inputs."""
    from lightning_fastmoe.huggingface import add_lora, dequantize_experts, quantize_experts

    torch.manual_seed(0)
    experts = experts_classes.make_experts(
        experts_classes.experts_classes()[name], d_model=128, d_ffn=64, dtype=dtype
    ).to("cuda")
    quantize_experts(in_a_model(experts), scheme)
    twin = copy.deepcopy(experts)
    dequantize_experts(in_a_model(twin))
    for one in (experts, twin):
        torch.manual_seed(1)
        add_lora(in_a_model(one), 8, 16.0)
        for parameter in one.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    x, ids, weights = experts_classes.make_inputs(tokens=300, d_model=128)
    inputs = x.to("cuda", dtype).requires_grad_(), ids.cuda(), weights.to("cuda", dtype)
    return experts, twin, inputs


def results(experts: Any, inputs: Any) -> list[torch.Tensor]:
    out = experts(*inputs)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    leaves = [inputs[0], *(p for p in experts.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_and_gradients_are_those_of_dequantised_weights(
    name: str, dtype: torch.dtype, scheme: str
) -> None:
    experts, twin, inputs = make(name, dtype, scheme)
    found, wanted = results(experts, inputs), results(twin, inputs)
    assert len(found) == 6
    for own, one in zip(found, wanted, strict=True):
        assert one.norm() > 0
        assert relative(own, one) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    with torch.no_grad():
        assert relative(experts(*inputs), found[0]) < 1e-2


def test_the_host_never_waits() -> None:
    experts, _, inputs = make("Qwen3MoeExperts", torch.bfloat16, "nf4-double")
    results(experts, inputs)  # compiles, allocates
    with host_never_waits():
        results(experts, inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_projection_of_one_layer_is_whole_at_a_time(checkpointing: bool) -> None:
    """A step of sixteen layers takes no more memory for weights than one of two."""
    from lightning_fastmoe.huggingface import add_lora, quantize_experts

    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 64}
    whole = 64 * 512 * 256 * 2  # bytes of gate_up_proj in bf16
    taken = []
    for layers in (2, 16):
        run = sharding_runs.Run("qwen3_moe", checkpointing=checkpointing)
        model = sharding_runs.make_model(run, num_hidden_layers=layers, **sizes).bfloat16()
        quantize_experts(model, "nf4-double")
        add_lora(model, 8)
        model = model.cuda().train()
        model.enable_input_require_grads()
        ids = torch.arange(3, 20, device="cuda")[None]
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(ids, labels=ids, use_cache=False).loss.backward()
        taken.append(torch.cuda.max_memory_allocated() - before)
        assert taken[-1] > 0.9 * whole
        del model
    assert taken[1] - taken[0] < whole
    assert taken[1] < 3 * whole


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_two_ranks_train_adapters_as_one_process(
    name: str, stage: int, rank_pool: RankPool, tmp_path: Path
) -> None:
    """Which files of the merged model show, too."""
    from lightning_fastmoe.huggingface import merge_lora

    run = replace(RUN, name=name, stage=stage)
    model = runs.packed(run)
    bits = {key: p.clone() for key, p in model.named_parameters() if not p.is_floating_point()}
    expected = lora_runs.reference(run, runs.packed(run))
    on_gpu = replace(run, accelerator="cuda", **SHARED)
    per_node = 1 if SHARED else None
    path = tmp_path / "last.ckpt"
    found = rank_pool.run(
        *(lora_runs.fits, 2, on_gpu, 2, path, None, True, runs.Packed), ranks_per_node=per_node
    )
    for weights in found:
        for own, twin in zip(weights, expected[:2], strict=True):
            for key, weight in twin.items():
                if key in bits:
                    assert torch.equal(own[key].cpu(), bits[key]), key
                else:
                    assert relative(own[key], weight) < 1e-4, key
    model.load_state_dict(expected[1])
    merge_lora(model)
    written = transformers.AutoModelForCausalLM.from_pretrained(
        path.with_suffix(".model"), dtype=torch.float32
    )
    for key, weight in written.named_parameters():
        limit = 4e-3 if ".experts." in key else 1e-4
        assert relative(weight, model.get_parameter(key)) < limit, key
