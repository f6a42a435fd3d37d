"""Whole models of transformers with ``experts_implementation="fastmoe"`` against "eager"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lightning_fastmoe.huggingface import add_lora, experts_class

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 16,
    },
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "olmoe": {"intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 0,
    },
}
each_model = pytest.mark.parametrize("name", MODELS)


def make_model(name: str, implementation: str = "fastmoe", **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **MODELS[name], **sizes})
    return transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )


def make_tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, SIZES["vocab_size"], (3, 11))


def step(model: Any, implementation: str) -> dict[str, Tensor]:
    """Logits, loss and gradients."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(make_tokens(), labels=make_tokens(), use_cache=False)
    out.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    experts = sum(".experts." in name for name in found)
    assert experts >= 2 * model.config.num_hidden_layers
    return {**found, "logits": out.logits.detach(), "loss": out.loss.detach()}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative distance."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - w).norm() / w.norm()) for n, w in wanted.items())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the experts that this package computed."""
    seen: list[str] = []
    weights = experts_class.stacked_weights

    def watched(experts: Any) -> Any:
        seen.append(type(experts).__name__)
        return weights(experts)

    monkeypatch.setattr(experts_class, "stacked_weights", watched)
    return seen


@each_model
def test_a_step(name: str, calls: list[str]) -> None:
    model = make_model(name).double()
    assert model.config._experts_implementation == "fastmoe"
    found = step(model, "fastmoe")
    assert len(calls) == 2  # one per layer
    wanted = step(model, "eager")
    assert len(calls) == 2
    assert furthest(found, wanted) < 1e-10


@each_model
def test_a_step_under_autocast(name: str) -> None:
    """One layer, so that both routers see the same tokens and choose the same experts."""
    model = make_model(name, num_hidden_layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (step(model, implementation) for implementation in ("fastmoe", "eager"))
    distance = furthest(found, wanted)
    assert 0 < distance < 2e-2


@each_model
def test_gradient_checkpointing(name: str, calls: list[str]) -> None:
    model = make_model(name).double().train()
    wanted = step(model, "eager")
    model.gradient_checkpointing_enable()
    found = step(model, "fastmoe")
    assert len(calls) == 4  # each layer twice
    assert furthest(found, wanted) < 1e-10


@pytest.mark.parametrize(
    ("name", "dtype", "adapted"),
    [
        *((name, torch.float32, False) for name in MODELS),
        ("gpt_oss", torch.float64, False),
        ("gpt_oss", torch.float32, True),
        ("qwen3_moe", torch.float32, True),
    ],
)
def test_compiled_layers(name: str, dtype: torch.dtype, adapted: bool) -> None:
    """Also grouped GEMMs: with adapters, or around an activation of the class's own."""
    torch._dynamo.reset()
    model = make_model(name).to(dtype)
    if adapted:
        for adapter in add_lora(model, rank=2, alpha=4):
            torch.nn.init.normal_(model.get_parameter(adapter), std=0.1)
    wanted = step(model, "fastmoe")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert furthest(step(model, "fastmoe"), wanted) < 64 * torch.finfo(dtype).eps


@each_model
def test_generate(name: str, calls: list[str]) -> None:
    model = make_model(name).double().eval()
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    found = model.generate(make_tokens(), **options)
    assert len(calls) == 14  # two layers, seven tokens
    model.set_experts_implementation("eager")
    assert torch.equal(found, model.generate(make_tokens(), **options))
    assert found.shape == (3, 18)


@each_model
def test_files_are_those_of_transformers(name: str, calls: list[str], tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path / "ours")
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path / "eager")
    files = sorted(path.name for path in (tmp_path / "eager").iterdir())
    assert "model.safetensors" in files
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "eager" / file).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", experts_implementation="fastmoe", local_files_only=True
    )
    state, calls[:] = model.state_dict(), []
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        difference = loaded.eval()(make_tokens()).logits - model.eval()(make_tokens()).logits
    assert len(calls) == 2
    assert difference.abs().max() < 1e-4


def test_an_unknown_name_lists_ours() -> None:
    with pytest.raises(ValueError, match='"fastmoe2"` is not supported.*implementation="fastmoe"`'):
        make_model("mixtral", "fastmoe2")
