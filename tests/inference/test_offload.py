"""Experts that visit the device layer by layer, against the same model as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.offload_models import D_MODEL, KINDS, Blocks
from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.ring import ExpertRing, Stack


def poisoned(ring: ExpertRing) -> None:
    """Fills each slot with NaN as soon as it is released."""
    copying = ring._copy

    def copy_over(layer: int, slot: Any) -> None:
        slot.memory.fill_(0xFF)
        copying(layer, slot)

    ring._copy = copy_over  # type: ignore[method-assign]
    for slot in ring._slots:
        copy_over(slot.layer, slot)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind: str, slots: int) -> None:
    model = Blocks(KINDS[kind]).eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = [torch.randn(n, D_MODEL) for n in (12, 1, 5, 0, 12)]
    with torch.inference_mode():
        expected = [model(batch) for batch in x]
        offloaded = offload_experts(model, "cpu", slots=slots)
        ring: Any = offloaded._ring
        poisoned(ring)
        for batch, right in zip(x, expected, strict=True):
            assert torch.equal(model(batch), right)
    assert ring.statistics.misses == 0
    assert {name: p.data_ptr() for name, p in model.named_parameters()}.keys() == weights.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    offloaded.close()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x[0]), expected[0])


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("order", [(3, 2, 1, 0), (0, 0, 1, 1, 2, 3), (2, 0, 3), (1, 3, 1, 0, 2)])
def test_layers_in_another_order(order: tuple[int, ...], slots: int) -> None:
    """What is not there when it is needed is copied then; a repeated order is learned."""
    model = Blocks({}, order).eval()
    x = torch.randn(9, D_MODEL)
    with torch.inference_mode():
        expected = model(x)
        offloaded = offload_experts(model, "cpu", slots=slots)
        poisoned(offloaded._ring)  # type: ignore[arg-type]
        for _ in range(3):
            assert torch.equal(model(x), expected)
        before = offloaded.statistics.misses
        assert torch.equal(model(x), expected)
    if len(set(order)) == len(order):
        assert offloaded.statistics.misses == before


def test_each_layer_is_copied_once_per_pass() -> None:
    model = Blocks({}).eval()
    x = torch.randn(9, D_MODEL)
    offloaded = offload_experts(model, "cpu", slots=2)
    size = offloaded.host_bytes // 4
    assert size == 4 * (2 * 8 + 8) * D_MODEL * 4
    assert offloaded.slot_bytes == 2 * size
    assert offloaded.statistics.copied == 2 * size
    with torch.inference_mode():
        for number in range(1, 4):
            model(x)
            assert offloaded.statistics.copied == (2 + 4 * number) * size


@pytest.mark.parametrize("resident", [1, 3, 4])
def test_resident_layers(resident: int) -> None:
    model = Blocks({}).eval()
    x = torch.randn(9, D_MODEL)
    with torch.inference_mode():
        expected = model(x)
        offloaded = offload_experts(model, "cpu", resident_layers=resident)
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert offloaded.resident_bytes * (4 - resident) == offloaded.host_bytes * resident
    offloaded.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_models_of_transformers_score_and_generate(name: str) -> None:
    model = make_model(Run(name)).eval()
    ids = torch.arange(3, 20).repeat(2, 1)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with torch.inference_mode():
        expected = model(ids).logits
        text = model.generate(ids[:, :4], **greedy)
        offloaded = offload_experts(model, "cpu", slots=1)
        poisoned(offloaded._ring)  # type: ignore[arg-type]
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids[:, :4], **greedy), text)
    assert offloaded.statistics.misses == 0


def test_an_error_in_a_pass_leaves_the_ring_usable() -> None:
    model = Blocks({}).eval()
    x = torch.randn(9, D_MODEL)
    with torch.inference_mode():
        expected = model(x)
        offload_experts(model, "cpu")
        with pytest.raises(RuntimeError):
            model.layers[1].experts(torch.randn(3, D_MODEL + 1), torch.tensor([1, 1, 1, 0]))
        assert torch.equal(model(x), expected)


def test_training_is_refused() -> None:
    model = Blocks({})
    offload_experts(model, "cpu")
    with pytest.raises(ConfigError, match="has its experts in host memory, so it can't be trained"):
        model(torch.randn(3, D_MODEL))


def test_models_that_can_not_be_offloaded() -> None:
    with pytest.raises(ConfigError, match="Linear has no experts to offload"):
        offload_experts(nn.Linear(2, 2), "cpu")
    with pytest.raises(ConfigError, match="slots=0 must be at least 1"):
        offload_experts(Blocks({}), "cpu", slots=0)
    with pytest.raises(ConfigError, match="resident_layers=5 between 0 and the model's 4 layers"):
        offload_experts(Blocks({}), "cpu", resident_layers=5)
    with pytest.raises(ConfigError, match=r"layers.0 are on meta, and not on the CPU"):
        offload_experts(Blocks({}).to("meta"), "cpu")
    tied = Blocks({})
    tied.layers[2].experts = tied.layers[1].experts
    with pytest.raises(ConfigError, match=r"layers.2 are those of another layer, too"):
        offload_experts(tied, "cpu")
    part = copy.deepcopy(Blocks({}))
    part.layers[0].experts.keep((1, 2))
    with pytest.raises(ConfigError, match=r"layers.0 holds only some of its experts"):
        offload_experts(part, "cpu")


def test_slots_hold_tensors_of_any_size_and_dtype() -> None:
    host = [torch.randn(3), torch.arange(5, dtype=torch.int8), torch.randn(2, 7).bfloat16()]
    stack = Stack(host)
    assert stack.slot_bytes == 3 * 256
    memory = torch.zeros(stack.slot_bytes, dtype=torch.uint8)
    for own, tensor in zip(stack.views(memory), host, strict=True):
        own.copy_(tensor)
    for own, tensor in zip(stack.views(memory), host, strict=True):
        assert own.dtype == tensor.dtype
        assert torch.equal(own, tensor)
