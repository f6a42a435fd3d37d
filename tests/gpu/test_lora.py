"""Adapters of stacked experts on a GPU: the layer, and a fine-tuning run with its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.closeness import host_never_waits
from torch import nn

from lightning_fastmoe.testing import RankPool

transformers: Any = pytest.importorskip("transformers")
experts_classes: Any = pytest.importorskip("huggingface.experts_classes")
runs: Any = pytest.importorskip("huggingface.lora_runs")
sharding_runs: Any = pytest.importorskip("huggingface.sharding_runs")

NAMES = ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"]
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


def make(name: str, dtype: torch.dtype, rank: int) -> tuple[Any, dict[str, nn.Parameter], Any]:
    """Experts on the GPU, their adapters, and what they are called with."""
    from lightning_fastmoe.huggingface import add_lora

    torch.manual_seed(0)
    experts = experts_classes.make_experts(
        experts_classes.experts_classes()[name], d_model=128, d_ffn=64
    )
    add_lora(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})}), rank, 2.0 * rank)
    adapters = {n: p for n, p in experts.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if name in adapters else 0.05))
    x, ids, weights = experts_classes.make_inputs(tokens=300, d_model=128)
    experts = experts.to("cuda", dtype)
    inputs = x.to("cuda", dtype).requires_grad_(), ids.cuda(), weights.to("cuda", dtype)
    return experts, adapters, inputs


def results(experts: Any, adapters: dict[str, nn.Parameter], inputs: Any) -> dict[str, Any]:
    x = inputs[0]
    out = experts(*inputs)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    found = torch.autograd.grad(out, [x, *adapters.values()], upstream)
    return dict(zip(["out", "x", *adapters], [out.detach(), *found], strict=True))


@pytest.mark.parametrize("rank", [8, 12])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_close_to_fp64(name: str, dtype: torch.dtype, rank: int) -> None:
    """As close as PyTorch's operators on the CPU, whose fp64 was compared with merged weights."""
    experts, adapters, inputs = make(name, dtype, rank)
    found = results(experts, adapters, inputs)
    on_cpu = tuple(t.detach().cpu().requires_grad_(t.requires_grad) for t in inputs)
    usual = results(experts.cpu(), adapters, on_cpu)
    exact = tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in on_cpu
    )
    wanted = results(experts.double(), adapters, exact)
    for key, value in wanted.items():
        assert value.norm() > 0, key
        limit = 1.2 * relative(usual[key], value) + max(torch.finfo(dtype).eps / 4, 2e-6)
        assert limit < 0.1, key
        assert relative(found[key], value) < limit, key


def test_the_host_never_waits() -> None:
    experts, adapters, inputs = make("Qwen3MoeExperts", torch.bfloat16, 8)
    results(experts, adapters, inputs)  # compiles, allocates
    with host_never_waits():
        results(experts, adapters, inputs)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_two_ranks_train_adapters_as_one_process(
    name: str, stage: int, rank_pool: RankPool, tmp_path: Path
) -> None:
    """Which files of the merged model show, too."""
    from lightning_fastmoe.huggingface import merge_lora

    run = replace(RUN, name=name, stage=stage)
    expected = runs.reference(run)
    on_gpu = replace(run, accelerator="cuda", **SHARED)
    per_node = 1 if SHARED else None
    path = tmp_path / "last.ckpt"
    found = rank_pool.run(runs.fits, 2, on_gpu, 2, path, None, True, ranks_per_node=per_node)
    start = {key: weight.detach() for key, weight in runs.adapted(run).named_parameters()}
    for weights in found:
        for own, twin in zip(weights, expected[:2], strict=True):
            for key, weight in twin.items():
                assert relative(own[key], weight) < 1e-4, key
                trained = "_lora_" in key or key == "lm_head.weight"
                assert torch.equal(own[key].cpu(), start[key]) != trained, key
    merged = runs.adapted(run)
    merged.load_state_dict(expected[1])
    merge_lora(merged)
    written = transformers.AutoModelForCausalLM.from_pretrained(path.with_suffix(".model"))
    for key, weight in written.named_parameters():
        assert relative(weight, merged.get_parameter(key)) < 1e-4, key
