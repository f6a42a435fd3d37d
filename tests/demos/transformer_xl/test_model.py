"""The Lightning module: losses and their memory, what decays, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.demos.byte_lm import generate
from lightning_fastmoe.demos.optimization import decay_groups
from lightning_fastmoe.demos.transformer_xl import Segment, TransformerXL
from lightning_fastmoe.errors import ConfigError

SIZES = {"d_model": 8, "num_layers": 2, "num_heads": 2, "d_ffn": 8, "num_experts": 4, "mem_len": 6}


def build() -> TransformerXL:
    torch.manual_seed(0)
    model = TransformerXL(**SIZES, init_std=0.3)
    model.configure_model()
    return model


def segment(seed: int, starts: bool) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    return Segment(torch.randint(0, 256, (2, 5), generator=generator).byte(), starts)


def bits(model: TransformerXL, batch: Segment, memory: list[Tensor]) -> Tensor:
    """Bits per byte of each row."""
    assert model.network is not None
    logits, _ = model.network(batch.tokens[:, :-1], memory)
    rows = zip(logits, batch.tokens[:, 1:].long(), strict=True)
    return torch.stack([F.cross_entropy(row, targets) for row, targets in rows]) / math.log(2)


@torch.no_grad()
def test_bits_per_byte_with_the_memory_of_evaluation_alone() -> None:
    model = build()
    first, second, third = segment(1, True), segment(2, False), segment(3, True)
    model.memory.append([torch.randn(2, 4, 8) for _ in range(2)])
    kept = model.memory.state_dict()
    torch.testing.assert_close(model.predict_step(first, 0), bits(model, first, []))
    remembered = model._evaluation_memory.layers
    assert [layer.shape for layer in remembered] == [(2, 4, 8)] * 2
    torch.testing.assert_close(model.predict_step(second, 1), bits(model, second, remembered))
    assert (bits(model, second, remembered) - bits(model, second, [])).abs().min() > 1e-4
    torch.testing.assert_close(model.predict_step(third, 2), bits(model, third, []))
    for layer, before in zip(model.memory.layers, kept["layers"], strict=True):
        assert torch.equal(layer, before)


def test_text_can_be_sampled_without_touching_a_memory() -> None:
    model = build()
    assert len(generate(model, b"def", 4, context=8)) == 4
    assert model.memory.layers == model._evaluation_memory.layers == []


def test_matrices_decay_and_the_vectors_u_and_v_do_not() -> None:
    model = build()
    decay, no_decay = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(parameter)] for parameter in no_decay["params"]}
    block = {
        f"network.blocks.{i}.{name}"
        for i in range(2)
        for name in (
            "attention_norm.weight",
            "attention.content_bias",
            "attention.position_bias",
            "moe_norm.weight",
        )
    }
    assert kept == {"network.embedding.weight", "network.norm.weight", *block}
    assert len(kept) + len(decay["params"]) == len(names)


@pytest.mark.parametrize("sizes", [{"d_model": 9, "num_heads": 3}, {"d_model": 8, "num_heads": 3}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"d_model is {sizes['d_model']} and num_heads is 3"):
        TransformerXL(**sizes)


def test_forward_before_configure_model_says_what_to_call() -> None:
    with pytest.raises(ConfigError, match="configure_model"):
        TransformerXL()(torch.zeros(1, 4))
