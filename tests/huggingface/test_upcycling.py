"""Dense models turned into mixtures: equal at first, on any rank's experts, and trainable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from huggingface import upcycling_runs
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import upcycle
from lightning_fastmoe.huggingface.dense_ffn import read_ffn
from lightning_fastmoe.nn import ModuleExperts, StackedExperts
from lightning_fastmoe.nn.placement import Placement, expert_placement
from lightning_fastmoe.testing import RankPool

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GATED = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "llama with exact gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
}
PLAIN = {
    "gpt2 with exact gelu": GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, activation_function="gelu", resid_pdrop=0.0
    ),
    "gpt neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}
MODULES = {
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
}
STACKED = GATED | PLAIN


def make(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens()).logits
    return found


@pytest.mark.parametrize("arguments", [{}, {"granularity": 4}, {"keep_dense": True}], ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_starts_as_the_dense_model(name: str, arguments: dict[str, Any]) -> None:
    model = make(STACKED[name])
    expected = logits(model)
    layers = upcycle(model, 4, 2, **arguments)
    assert len(layers) == 2
    for layer in layers.values():
        assert isinstance(layer.experts, StackedExperts)
        assert layer.num_experts == 4 * arguments.get("granularity", 1)
        assert layer.top_k == 2 * arguments.get("granularity", 1)
        assert not layer.training
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-10)
    with torch.no_grad():  # not vacuous: the experts take part
        for layer in layers.values():
            layer.experts.down_proj += torch.randn_like(layer.experts.down_proj)
    assert (logits(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_ffns_with_something_of_their_own_are_copied_whole(name: str) -> None:
    model = make(MODULES[name])
    expected = logits(model)
    for layer in upcycle(model, 3, 2).values():
        assert isinstance(layer.experts, ModuleExperts)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-10)


class Scaled(nn.Module):
    """Parts like Llama's, but another forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down_proj, self.act_fn = nn.Linear(6, 4, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_another_forward_pass_is_noticed() -> None:
    ffn = read_ffn(Scaled())
    assert ffn is not None
    assert ffn.activation is None
    model = nn.Sequential(Scaled())
    x = torch.randn(5, 4)
    expected = model(x)
    (layer,) = upcycle(model, 2, 2).values()
    assert isinstance(layer.experts, ModuleExperts)
    torch.testing.assert_close(model(x), expected)


def test_further_parameters_are_not_an_ffn() -> None:
    module = Scaled()
    module.scale = nn.Parameter(torch.ones(4))
    assert read_ffn(module) is None


@pytest.mark.parametrize(("name", "granularity"), [("llama", 1), ("llama", 2), ("gpt2", 1)])
def test_a_rank_copies_its_experts(name: str, granularity: int) -> None:
    """With noise too: what an expert gets depends on its global id alone."""
    config = (GATED | MODULES)[name]
    options = {"granularity": granularity, "noise": 0.1, "seed": 3}
    whole = upcycle(make(config), 4, 2, **options)
    ids = (granularity, 3 * granularity)
    with expert_placement(lambda num_experts: Placement(ids)):
        local = upcycle(make(config), 4, 2, **options)
    for key, layer in whole.items():
        if isinstance(layer.experts, StackedExperts):
            assert torch.equal(local[key].experts.up_proj, layer.experts.up_proj[[*ids]])
            assert torch.equal(local[key].experts.down_proj, layer.experts.down_proj[[*ids]])
        else:
            mine, theirs = dict(local[key].experts.named_parameters()), layer.experts.state_dict()
            assert {n.split(".")[0] for n in mine} == {str(i) for i in ids}
            assert all(torch.equal(p, theirs[n]) for n, p in mine.items())


def test_noise_has_the_size_that_is_asked_for() -> None:
    plain, noisy = (upcycle(make(GATED["llama"]), 4, 2, noise=n) for n in (0.0, 0.25))
    for key in plain:
        for name in ("up_proj", "down_proj"):
            before, after = (getattr(m[key].experts, name) for m in (plain, noisy))
            ratio = float(((after - before).std() / before.std()).detach())
            assert ratio == pytest.approx(0.25, rel=0.1)
            assert not torch.equal(after[0] - before[0], after[1] - before[1])


def test_pieces_of_a_copy_are_chosen_together_and_learn_apart() -> None:
    model = make(GATED["llama"]).train()
    layers = upcycle(model, 4, 2, granularity=3)
    layer = next(iter(layers.values()))
    weight = layer.router.weight.unflatten(0, (4, 3))
    assert torch.equal(weight, weight[:, :1].expand_as(weight))
    assert len(weight[:, 0].unique(dim=0)) == 4
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    weight = layer.router.weight.unflatten(0, (4, 3))
    assert not torch.equal(weight, weight[:, :1].expand_as(weight))


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_dropout_and_mode_are_kept(activation: str) -> None:
    config = copy.deepcopy(MODULES["gpt2"])
    config.activation_function = activation
    model = make(config).train()
    model.transformer.h[0].mlp.eval()
    layers = upcycle(model, 2, 2)
    assert [layer.training for layer in layers.values()] == [False, True]
    copied = layers["transformer.h.1.mlp"].experts.get_submodule("0")
    assert isinstance(copied.dropout, nn.Dropout)


def test_some_layers_alone() -> None:
    model = make(GATED["qwen3"])
    expected = logits(model)
    layers = upcycle(model, 4, 2, match=lambda name, _: name == "model.layers.1.mlp")
    assert list(layers) == ["model.layers.1.mlp"]
    assert not isinstance(model.model.layers[0].mlp, MoE)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 1}, "top_k=1 of 4 copies. It must be at least 2"),
        ({"top_k": 5}, "top_k=5 of 4 copies"),
        ({"granularity": 5}, "granularity=5 doesn't divide the FFN's width of 24"),
        ({"granularity": 0}, "granularity must be at least 1"),
        ({"noise": -0.1}, "noise not negative"),
        ({"activation": "gelu"}, "doesn't take activation"),
        ({"normalize_weights": False}, "don't sum to one"),
        ({"keep_dense": True, "shared_expert_gate": True}, "doesn't take shared_expert_gate"),
        ({"match": lambda name, _: name == "model.norm"}, "LlamaRMSNorm matches, but isn't"),
        ({"match": lambda *_: False}, "no module of the model matches"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    model = make(GATED["llama"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        upcycle(model, 4, **arguments)
    assert model.state_dict().keys() == before.keys()


def test_ffns_that_share_parameters_are_refused() -> None:
    model = make(GATED["llama"])
    first, second = (block.mlp for block in model.model.layers)
    second.gate_proj.weight = first.gate_proj.weight
    with pytest.raises(ConfigError, match="share parameters"):
        upcycle(model, 4)
    assert model.model.layers[0].mlp is first


def test_a_block_with_two_names_is_converted_once() -> None:
    model = make(MODULES["gpt2"])
    model.config.use_cache = False
    model.transformer.h[1] = model.transformer.h[0]
    expected = logits(model)
    layers = upcycle(model, 2, 2)
    assert list(layers) == ["transformer.h.0.mlp"]
    assert model.transformer.h[1].mlp is layers["transformer.h.0.mlp"]
    assert not any(isinstance(m, MoE) for m in layers["transformer.h.0.mlp"].experts.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-10)


def test_without_weights_nothing_is_decided() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GATED["llama"])
    with pytest.raises(ConfigError, match="LlamaMLP is on the meta device"):
        upcycle(model, 4)


def test_frozen_ffns_become_frozen_experts() -> None:
    model = make(GATED["llama"])
    model.model.layers[0].mlp.requires_grad_(False)
    frozen, trained = upcycle(model, 4).values()
    assert not any(p.requires_grad for p in frozen.experts.parameters())
    assert frozen.router.weight.requires_grad
    assert all(p.requires_grad for p in trained.parameters())


class WithResidual(Scaled):
    """Takes the residual too, as Bloom's does."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + residual


def test_an_ffn_that_takes_more_is_none() -> None:
    assert read_ffn(WithResidual()) is None


def test_one_expert_is_enough_beside_the_dense_ffn() -> None:
    model = make(GATED["llama"])
    expected = logits(model)
    upcycle(model, 4, 1, keep_dense=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_ranks_train_as_one_process_does(noise: float, rank_pool: RankPool) -> None:
    (dense, _), *_ = rank_pool.run(upcycling_runs.train, 1, 1, -1.0)
    ((expected, whole),) = rank_pool.run(upcycling_runs.train, 1, 1, noise)
    assert whole == [4, 4]
    assert (expected[0] == pytest.approx(dense[0], rel=1e-5)) is (noise == 0.0)
    assert expected[-1] < expected[0]
    for losses, local in rank_pool.run(upcycling_runs.train, 2, 2, noise):
        assert local == [2, 2]
        assert losses == pytest.approx(expected, rel=1e-4)
