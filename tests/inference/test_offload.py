"""Experts that visit the device layer by layer, against the same model as a whole."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.offload_models import D_MODEL, KINDS, Blocks, poisoned
from torch import nn
from torchmetrics import MeanMetric

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.layer import OffloadedLayer
from lightning_fastmoe.inference.pinned import PinnedMemory
from lightning_fastmoe.inference.ring import ExpertRing, Stack


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


@pytest.mark.parametrize("resident", [0, 1, 4])
def test_weights_that_are_loaded_while_offloaded_are_used_and_kept(resident: int) -> None:
    """Slots are filled ahead, from what was there before."""
    model, other = Blocks({}).eval(), Blocks({}).eval()
    x = torch.randn(9, D_MODEL)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
        expected = other(x)
    offloaded = offload_experts(model, "cpu", slots=3, resident_layers=resident)
    with torch.inference_mode():
        assert not torch.equal(model(x), expected)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    offloaded.close()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_what_changes_resident_experts_in_place_is_kept() -> None:
    """As on a GPU, where their parameters are not those on the host."""
    parameter = nn.Parameter(torch.zeros(2))
    layer = OffloadedLayer(nn.ParameterList([parameter]), [parameter])
    layer.put([torch.ones(2)])
    with torch.no_grad():
        parameter += 1
    layer.take_back()
    assert parameter.tolist() == layer.host[0].tolist() == [2.0, 2.0]
    assert parameter.data_ptr() == layer.host[0].data_ptr()


def test_parameters_that_were_converted_are_refused_and_left_alone() -> None:
    model = Blocks({}).eval()
    offloaded = offload_experts(model, "cpu")
    model.double()
    with torch.no_grad():
        with pytest.raises(ConfigError, match="have been moved, converted or replaced"):
            model(torch.randn(3, D_MODEL).double())
        offloaded.close()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert model(torch.randn(3, D_MODEL).double()).dtype == torch.float64


def test_an_error_at_set_up_leaves_nothing_behind() -> None:
    model = Blocks({}).eval()
    model.norm = nn.LayerNorm(D_MODEL, device="meta")
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="meta tensor"):
            offload_experts(model, "cpu")
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    model.norm = nn.LayerNorm(D_MODEL)
    offload_experts(model, "cpu").close()


@pytest.mark.parametrize("slots", [1, 2])
def test_a_pass_that_is_interrupted_leaves_the_ring_usable(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks are not called after a KeyboardInterrupt."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = Blocks({}).eval()
    x = torch.randn(9, D_MODEL)
    with torch.inference_mode():
        expected = model(x)
        offloaded = offload_experts(model, "cpu", slots=slots)
        poisoned(offloaded._ring)  # type: ignore[arg-type]
        for number in (2, 1, 3):
            with monkeypatch.context() as patch:
                patch.setattr(model.layers[number].experts, "forward", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    model(x)
            assert torch.equal(model(x), expected)


def test_a_copy_of_an_offloaded_model_is_an_ordinary_one() -> None:
    model = Blocks({}).eval()
    x = torch.randn(9, D_MODEL)
    offloaded = offload_experts(model, "cpu")
    other = copy.deepcopy(model)
    other(x).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    with torch.no_grad():
        before = offloaded.statistics.copied
        expected = other(x)
        assert offloaded.statistics.copied == before
        assert torch.equal(model(x), expected)
        offloaded.close()
        assert torch.equal(other(x), expected)


def test_the_rest_is_moved_by_its_own_to() -> None:
    """Lightning's modules and metrics know then where they are."""

    class Measured(Blocks):
        def __init__(self) -> None:
            super().__init__({})
            self.metric = MeanMetric()

    model = Measured()
    offload_experts(model, "meta")
    assert model.metric.device.type == model.metric.mean_value.device.type == "meta"
    assert model.norm.weight.device.type == "meta"
    assert model.layers[0].experts.dtype == torch.float32
    assert {p.device.type for p in model.layers[0].experts.parameters()} == {"cpu"}


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
    twice = Blocks({})
    offload_experts(twice, "cpu")
    with pytest.raises(ConfigError, match=r"layers.0 are offloaded already: close"):
        offload_experts(twice, "cpu")
    part = copy.deepcopy(Blocks({}))
    part.layers[0].experts.keep((1, 2))
    with pytest.raises(ConfigError, match=r"layers.0 holds only some of its experts"):
        offload_experts(part, "cpu")


def test_a_wait_is_that_of_the_experts_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the current device, whose stream computes nothing if they are on another GPU."""
    device = torch.device("cpu")
    ring = ExpertRing([Stack([torch.ones(2)])], device, 1)
    waiting: list[Any] = []
    ring._slots[0].filled = SimpleNamespace(wait=lambda stream=None: waiting.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("of", device))
    ring.acquire(0)
    assert waiting == [("of", device)]


def test_a_gpu_that_failed_does_not_keep_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blocks({}).eval()
    host = [parameter.data_ptr() for parameter in model.parameters()]
    offloaded = offload_experts(model, "cpu", slots=1)
    layer: Any = offloaded._layers[0]
    layer.put([tensor.clone() for tensor in layer.host])
    pinned = SimpleNamespace(closed=0)
    pinned.close = lambda: setattr(pinned, "closed", 1)
    offloaded._pinned = pinned  # type: ignore[assignment]

    def fail() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(offloaded._ring, "close", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        offloaded.close()
    assert pinned.closed == 1
    assert [parameter.data_ptr() for parameter in model.parameters()] == host


@pytest.mark.filterwarnings("error")
def test_memory_is_unpinned_if_the_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[int] = set()

    def register(pointer: int, size: int, flags: int) -> int:
        if held:
            return 2  # cudaErrorMemoryAllocation
        held.add(pointer)
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=held.discard)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: zeros(1))
    large = [torch.empty(1 << 20) for _ in range(2)]
    with pytest.raises(UserWarning, match=r"0.0 GB of experts can't be registered"):
        PinnedMemory(large)
    assert not held


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
