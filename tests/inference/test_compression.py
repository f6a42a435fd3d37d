"""Experts that are int8 or int4 in host memory, against a model with the rounded weights."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.compressed_models import ROUNDED, rounded
from inference.offload_models import D_MODEL, KINDS, Blocks
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.ops.group_quantization import BITS
from lightning_fastmoe.planning.compressed import compressed_parameters

pytestmark = pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")


def poisoned(offloaded: Any) -> None:
    """Fills slots with NaN when they are released, and the workspace before it is written."""
    ring, layers = offloaded._ring, offloaded._compressed
    copying, decompressing = ring._copy, layers.decompress

    def copy_over(layer: int, slot: Any) -> None:
        slot.memory.fill_(0xFF)
        copying(layer, slot)

    def decompress_over(*args: Any) -> list[Tensor]:
        layers._memory.fill_(0xFF)
        layers._scratch.fill_(-1)
        tensors: list[Tensor] = decompressing(*args)
        return tensors

    ring._copy, layers.decompress = copy_over, decompress_over
    for slot in ring._slots:
        copy_over(slot.layer, slot)


@pytest.mark.parametrize("compression", BITS)
@pytest.mark.parametrize(
    ("kind", "slots"),
    [("softmax", 1), ("softmax", 2), ("softmax", 9), ("shared", 2), ("bias", 1), ("modules", 9)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bits_of_the_rounded_model(
    kind: str, compression: str, slots: int, dtype: torch.dtype
) -> None:
    model = Blocks(KINDS[kind]).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
    exact, right = copy.deepcopy(model), rounded(model, compression)
    x = [torch.randn(n, D_MODEL, dtype=dtype) for n in (12, 1, 0, 12)]
    with torch.inference_mode():
        expected = [right(batch) for batch in x]
        assert not torch.equal(expected[0], exact(x[0]))
        offloaded = offload_experts(model, "cpu", slots=slots, compression=compression)
        poisoned(offloaded)
        for batch, wanted in zip(x, expected, strict=True):
            assert torch.equal(model(batch), wanted)
    assert offloaded.statistics.misses == 0
    offloaded.close()
    for (name, a), b in zip(model.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._state_dict_pre_hooks
        or part._load_state_dict_pre_hooks
        for part in model.modules()
    )


def test_a_second_time_changes_nothing() -> None:
    """What one call of the Trainer has rounded, the next one rounds to the same."""
    model = Blocks({}).eval().bfloat16()
    with pytest.warns(UserWarning, match=ROUNDED):
        offload_experts(model, "cpu", compression="int4").close()
    once = copy.deepcopy(model.state_dict())
    offload_experts(model, "cpu", compression="int4").close()
    for name, value in model.state_dict().items():
        assert torch.equal(value, once[name]), name


def test_what_was_closed_keeps_no_weights() -> None:
    """They would stay beside those that are compressed the next time."""
    model = Blocks({}).eval()
    closed: Any = offload_experts(model, "cpu", resident_layers=2)
    layers = [weakref.ref(layer) for layer in (*closed._layers, *closed._resident)]
    closed.close()
    gc.collect()
    assert [layer() for layer in layers] == [None] * 4
    closed.close()
    assert closed.host_bytes == closed.resident_bytes > 0


@pytest.mark.parametrize("resident", [1, 4])
def test_resident_layers_are_not_compressed(resident: int) -> None:
    model = Blocks({}).eval()
    right = rounded(model, "int4", resident)
    x = torch.randn(9, D_MODEL)
    with torch.inference_mode():
        offloaded = offload_experts(model, "cpu", resident_layers=resident, compression="int4")
        assert torch.equal(model(x), right(x))
    offloaded.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_models_of_transformers(name: str) -> None:
    model = make_model(Run(name)).eval()
    right = rounded(model, "int8")
    ids = torch.arange(3, 20).repeat(2, 1)
    with torch.inference_mode():
        expected = right(ids).logits
        offloaded = offload_experts(model, "cpu", compression="int8")
        poisoned(offloaded)
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
    offloaded.close()


@pytest.mark.parametrize(("compression", "share"), [("int8", 66 / 128), ("int4", 34 / 128)])
def test_bytes_that_are_kept_and_copied(compression: str, share: float) -> None:
    """Also that what was there before is let go, layer by layer."""
    model = nn.Sequential(*[MoE(64, 64, 2, top_k=2) for _ in range(3)]).eval().bfloat16()
    whole = 2 * 3 * 64 * 64 * 2
    originals = [p.untyped_storage().data_ptr() for p in model[0].experts.parameters()]
    offloaded = offload_experts(model, "cpu", compression=compression)
    assert offloaded.host_bytes == 3 * whole * share
    scratch = 2 * 2 * 64 * 64 // 2 if compression == "int4" else 0
    assert offloaded.slot_bytes == 2 * whole * share + whole + scratch
    gc.collect()
    for parameter in model[0].experts.parameters():
        assert parameter.untyped_storage().nbytes() == 2
        assert parameter.untyped_storage().data_ptr() not in originals
        assert parameter.isnan().all()
    with torch.inference_mode():
        model(torch.randn(5, 64).bfloat16())
    assert offloaded.statistics.copied == (2 + 3) * whole * share
    offloaded.close()


def test_memory_is_freed_parameter_by_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fastmoe.inference import compression

    model = Blocks({}).eval()
    alive: list[int] = []
    made = compression.CompressedWeight

    class Counted(made):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            alive.append(
                sum(
                    p.untyped_storage().nbytes() for n, p in model.named_parameters() if "proj" in n
                )
            )
            super().__init__(*args)

    monkeypatch.setattr(compression, "CompressedWeight", Counted)
    offload_experts(model, "cpu", compression="int8").close()
    up, down = 4 * 2 * 8 * D_MODEL * 4, 4 * 8 * D_MODEL * 4
    left = [4 * (up + down) - n * (up + down) - k * up for n in range(4) for k in (0, 1)]
    small = [4 * (2 * n + k) for n in range(4) for k in (0, 1)]  # the placeholders
    assert alive == [a + b for a, b in zip(left, small, strict=True)]


def test_small_parameters_keep_their_bits() -> None:
    """Biases, adapters, what is not of a floating dtype, and what would not get smaller."""
    model = MoE(128, 64, 4, top_k=2, bias=True, activation="gelu")
    experts = model.experts
    experts.register_parameter("adapter", nn.Parameter(torch.zeros(4, 4, 128)))
    codes = torch.zeros(4, 64, 128, dtype=torch.int8)
    experts.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
    narrow = torch.zeros(4, 8192, 2, dtype=torch.bfloat16)
    experts.register_parameter("narrow", nn.Parameter(narrow))
    ((_, layer),) = expert_layers(model)
    for bits, chosen in ((8, ["up_proj", "down_proj"]), (4, ["up_proj", "down_proj", "narrow"])):
        named = zip(experts.named_parameters(), compressed_parameters(layer, bits), strict=True)
        assert [name for (name, _), is_chosen in named if is_chosen] == chosen


def test_the_next_copy_begins_while_a_layer_computes() -> None:
    """Also with one slot, which holds what is compressed."""
    model = Blocks({}).eval()
    offloaded: Any = offload_experts(model, "cpu", slots=1, compression="int8")
    coming: list[int] = []
    for layer in model.layers:
        layer.experts.register_forward_pre_hook(
            lambda *_: coming.append(offloaded._ring._slots[0].layer)
        )
    with torch.inference_mode():
        model(torch.randn(3, D_MODEL))
    assert coming == [1, 2, 3, 0]
    offloaded.close()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("kind", ["softmax", "modules"])
def test_values_that_are_not_finite_are_refused(kind: str, bad: float) -> None:
    """Before anything is rounded."""
    model = Blocks(KINDS[kind]).eval()
    name = "up_proj" if kind == "softmax" else "2.2.weight"
    parameter = model.layers[3].experts.get_parameter(name)
    with torch.no_grad():
        (parameter[2] if kind == "softmax" else parameter)[1, 3] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=f"Expert 2 of layers.3 has values in {name} that are no"):
        offload_experts(model, "cpu", compression="int8")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) or key.endswith(name), key
    offload_experts(model, "cpu", compression="int8", resident_layers=1).close()


def test_what_compressed_experts_refuse() -> None:
    model = Blocks({"bias": True, "activation": "gelu"}).eval()
    x = torch.randn(3, D_MODEL)
    weights = copy.deepcopy(model.state_dict())
    offloaded = offload_experts(model, "cpu", compression="int8")
    with pytest.raises(ConfigError, match=r"weights of layers.0 can't be saved .* to int8: what"):
        model.state_dict()
    with pytest.raises(ConfigError, match=r"weights of layers.0 can't be loaded while"):
        model.load_state_dict(weights)
    other = copy.deepcopy(model)
    with torch.inference_mode():
        with pytest.raises(ConfigError, match=r"weights of layers.0 can't be copied while"):
            other(x)
        right = model(x)
    with torch.no_grad():
        model.layers[1].experts.down_bias += 1
        assert not torch.equal(model(x), right)  # a bias is not compressed, and may be changed
        model.layers[1].experts.up_proj.zero_()
        with pytest.raises(ConfigError, match=r"layers.1 can't be changed in place while"):
            model(x)
    offloaded.close()
    with torch.no_grad():
        assert model(x).isfinite().all()
        assert not model.layers[1].experts.up_proj.eq(0).all()
        model.load_state_dict(weights)
    with pytest.raises(ConfigError, match="compression='fp8' is unknown: use int8 or int4, or"):
        offload_experts(model, "cpu", compression="fp8")


def test_a_pass_that_changes_weights_is_refused() -> None:
    model = Blocks({}).eval()

    def halve(module: Any, args: Any) -> None:
        module.down_proj.mul_(0.5)

    offloaded = offload_experts(model, "cpu", compression="int8")
    handle = model.layers[2].experts.register_forward_pre_hook(halve)
    with torch.no_grad(), pytest.raises(ConfigError, match="changed in place"):
        model(torch.randn(3, D_MODEL))
    handle.remove()
    offloaded.close()


def test_converted_while_compressed() -> None:
    """Refused by the next pass; closing gives the weights the other dtype."""
    model = Blocks({}).eval()
    right = rounded(model, "int8").double()
    offloaded = offload_experts(model, "cpu", compression="int8")
    model.double()
    x = torch.randn(3, D_MODEL).double()
    with torch.no_grad():
        with pytest.raises(ConfigError, match="have been moved, converted or replaced"):
            model(x)
        offloaded.close()
        assert torch.equal(model(x), right(x))


def test_an_interruption_loses_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """While some layers are compressed already, and in a pass."""
    from lightning_fastmoe.inference import compression

    model = Blocks({}).eval()
    right = rounded(model, "int8")
    calls: list[int] = []
    quantize = compression.quantize_groups

    def interrupted(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return quantize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(compression, "quantize_groups", interrupted)
        with pytest.raises(KeyboardInterrupt):
            offload_experts(model, "cpu", compression="int8")
    model.state_dict()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    x = torch.randn(5, D_MODEL)
    with torch.inference_mode():
        offloaded = offload_experts(model, "cpu", compression="int8")
        poisoned(offloaded)
        expected = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(model.layers[1].experts, "forward", interrupted)
            calls[:] = [0] * 4
            with pytest.raises(KeyboardInterrupt):
                model(x)
        assert torch.equal(model(x), expected)
        assert torch.allclose(expected, right(x), atol=1e-4)
    offloaded.close()
