"""Few tokens with experts in host memory on a GPU: nothing reads what wasn't chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.offload_models import Blocks, disturbed
from torch import nn

from lightning_fastmoe.inference import offload_experts

D_MODEL, BATCHES = 64, (300, 1, 1, 3, 1, 0, 1, 300, 300, 2, 1)
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "bias": {"bias": True, "activation": "gelu"},
    "composed": {"bias": True, "activation": "clamped_swiglu"},
    "shared": {"shared_expert": 32},
    "dropping": {"capacity_factor": 1.0},
    "soft": {"router": "soft", "top_k": None},
}


@pytest.mark.parametrize("cycles", [0, 3_000_000])
@pytest.mark.parametrize(("slots", "cache"), [(1, None), (2, None), (1, "64KB"), (3, "1MB")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(
    kind: str, dtype: torch.dtype, slots: int, cache: str | None, cycles: int
) -> None:
    """By the kernels of each dtype: those for compute capability 9.0, and torch's."""
    cache = None if kind == "soft" else cache
    sizes = {"d_ffn": 32, "num_experts": 16, "top_k": 2}
    model: nn.Module = Blocks({**sizes, **KINDS[kind]}, d_model=D_MODEL)
    model = model.to(dtype).eval().requires_grad_(False)
    host = {name: parameter.data for name, parameter in model.named_parameters()}
    batches = [torch.randn(n, D_MODEL, device="cuda", dtype=dtype) for n in BATCHES]
    with torch.inference_mode():
        model.cuda()
        right = [model(batch) for batch in batches]
        for name, parameter in model.named_parameters():
            parameter.data = host[name]
        offloaded = offload_experts(model, "cuda", slots=slots, expert_cache=cache)
        disturbed(offloaded, cycles)
        for _ in range(2):
            for batch, expected in zip(batches, right, strict=True):
                assert torch.equal(model(batch), expected)
    assert offloaded.statistics.misses == 0
    if kind != "soft":
        assert offloaded.statistics.expert_misses > 0
    offloaded.close()


@pytest.mark.parametrize("cache", [None, "20KB"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_models_of_transformers(name: str, cache: str | None) -> None:
    model = make_model(Run(name, sizes={"num_local_experts": 8, "num_experts": 8}))
    model = model.bfloat16().eval().requires_grad_(False)
    host = {name: parameter.data for name, parameter in model.named_parameters()}
    prompts = [torch.arange(3, 3 + n, device="cuda")[None] for n in (20, 1, 2, 1, 20)]
    with torch.inference_mode():
        model.cuda()
        right = [model(prompt, use_cache=False).logits for prompt in prompts]
        for name, parameter in model.named_parameters():
            parameter.data = host[name]
        offloaded = offload_experts(model, "cuda", slots=1, expert_cache=cache)
        disturbed(offloaded, 3_000_000)
        for _ in range(2):
            for prompt, expected in zip(prompts, right, strict=True):
                assert torch.equal(model(prompt, use_cache=False).logits, expected)
    assert offloaded.statistics.expert_misses > 0
    offloaded.close()
