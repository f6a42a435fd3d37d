"""Experts that visit a GPU in groups: the layer as a whole, but for the rounding of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.offload_models import disturbed
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.inference import offload_experts

D_MODEL, BATCHES = 64, (300, 1, 3, 0, 300, 1, 300)
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "bias": {"bias": True, "activation": "gelu"},
    "composed": {"activation": "clamped_swiglu"},
    "dropping": {"capacity_factor": 1.0},
    "soft": {"router": "soft", "top_k": None},
}


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    """Within two roundings of the largest output."""
    eps = torch.finfo(right.dtype).eps
    scale = right.abs().amax().item() if right.numel() else 1.0
    torch.testing.assert_close(found, right, rtol=2 * eps, atol=2 * eps * scale)


def on_gpu_and_back(model: nn.Module, inputs: list[Any]) -> list[torch.Tensor]:
    """What a model makes of inputs on the GPU; its parameters are on the CPU again."""
    host = {name: parameter.data for name, parameter in model.named_parameters()}
    model.cuda()
    right = [model(*each) for each in inputs]
    for name, parameter in model.named_parameters():
        parameter.data = host[name]
    return right


@pytest.mark.parametrize("cycles", [0, 3_000_000])
@pytest.mark.parametrize(("groups", "slots"), [(2, 1), (3, 2), (16, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer(kind: str, dtype: torch.dtype, groups: int, slots: int, cycles: int) -> None:
    torch.manual_seed(3)
    layer = MoE(**{"d_model": D_MODEL, "d_ffn": 32, "num_experts": 16, "top_k": 4, **KINDS[kind]})
    layer = layer.to(dtype).eval().requires_grad_(False)
    inputs = [(torch.randn(n, D_MODEL, device="cuda", dtype=dtype),) for n in BATCHES]
    with torch.inference_mode():
        right = on_gpu_and_back(layer, inputs)
        offloaded = offload_experts(layer, "cuda", slots=slots, groups=groups)
        disturbed(offloaded, cycles)
        for _ in range(2):
            for each, expected in zip(inputs, right, strict=True):
                close(layer(*each), expected)
    assert offloaded.statistics.misses == 0
    offloaded.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_of_transformers(name: str) -> None:
    model = make_model(Run(name)).bfloat16().eval().requires_grad_(False)
    experts = model.model.layers[0].mlp.experts
    width, (number, k) = model.config.hidden_size, {"qwen3_moe": (8, 3), "gpt_oss": (4, 2)}[name]
    inputs = []
    for tokens in (100, 1, 7):
        x = torch.randn(tokens, width, device="cuda").bfloat16()
        scores = torch.rand(tokens, number, device="cuda").topk(k)
        inputs.append((x, scores.indices, scores.values))
    with torch.inference_mode():
        right = on_gpu_and_back(experts, inputs)
        offloaded = offload_experts(model.model.layers[0], "cuda", slots=2, groups=2)
        disturbed(offloaded, 3_000_000)
        for _ in range(2):
            for each, expected in zip(inputs, right, strict=True):
                close(experts(*each), expected)
    offloaded.close()
