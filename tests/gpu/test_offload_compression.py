"""Experts that are int8 or int4 in host memory, on a GPU: the bits of the rounded model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inference.compressed_models import ROUNDED, rounded
from inference.offload_models import D_MODEL, KINDS, Blocks
from torch import Tensor

from lightning_fastmoe import MoE
from lightning_fastmoe.inference import compression_error, offload_experts
from lightning_fastmoe.ops import group_quantization
from lightning_fastmoe.ops.group_quantization import (
    BITS,
    SCALE_DTYPES,
    dequantize_groups,
    quantize_groups,
    scratch_bytes,
)
from lightning_fastmoe.ops.native import load

pytestmark = pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")


WHOLE = [(64, True), (640, True), (2048, True), (2048, False)]
"""Widths of whole groups, which the kernel takes, and its twin on the GPU."""


def disturbed(offloaded: Any, cycles: int) -> None:
    """Slots and the workspace are poisoned when they are free, and each copy begins late."""
    ring, layers = offloaded._ring, offloaded._compressed
    copying, decompressing = ring._copy, layers.decompress

    def late(layer: int, slot: Any) -> None:
        slot.memory.fill_(0xFF)
        with torch.cuda.stream(ring._stream):
            torch.cuda._sleep(cycles)
        copying(layer, slot)

    def poisoned(*args: Any) -> list[Tensor]:
        layers._memory.fill_(0xFF)
        layers._scratch.fill_(-1)
        tensors: list[Tensor] = decompressing(*args)
        return tensors

    ring._copy, layers.decompress = late, poisoned


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize(("width", "has_kernel"), [(8, True), (65, True), (200, True)] + WHOLE)
def test_the_cpu_and_the_gpu_round_to_the_same_bits(
    width: int, has_kernel: bool, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(group_quantization, "native", lambda *_: None)
    weight = torch.randn(3, 50, width, dtype=dtype)
    weight[0, 1] = 0
    weight[1, :, ::9] *= 100
    codes, scales = quantize_groups(weight, bits)
    there = quantize_groups(weight.cuda(), bits)
    for own, other in zip((codes, scales), there, strict=True):
        assert torch.equal(own, other.cpu())
    for own, other in zip(quantize_groups(weight, bits, torch.device("cuda")), there, strict=True):
        assert torch.equal(own, other.cpu())
    here = torch.full_like(weight, torch.nan)
    dequantize_groups(codes, scales, here, bits)
    out = torch.full_like(weight, torch.nan, device="cuda")
    scratch = torch.empty(scratch_bytes(weight.shape, bits), dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dequantize_groups(*there, out, bits, scratch)
    assert torch.cuda.max_memory_allocated() <= before  # all it needs is planned for
    assert torch.equal(out.cpu(), here)


@pytest.fixture
def library() -> Any:
    kernels = load()
    assert kernels is not None, "the kernels must build and load on a machine with a CUDA device"
    return kernels


@pytest.mark.parametrize("bits", BITS.values())
def test_the_operator_passes_opcheck_and_names_the_rule(library: Any, bits: int) -> None:
    weight = torch.randn(3, 5, 128, device="cuda").bfloat16()
    codes, scales = quantize_groups(weight, bits)
    op, out = library.dequantize_groups_, torch.empty_like(weight)
    torch.library.opcheck(op.default, (codes, scales, out, bits))
    op(codes[:0], scales[:0], out[:0], bits)
    for arguments, rule in (
        ((codes, scales, out, 5), "bits must be 8 or 4, not 5"),
        ((codes, scales.float(), out, bits), "scales must be BFloat16, not Float"),
        ((codes.int(), scales, out, bits), "codes must be Char, not Int"),
        ((codes[:2], scales, out, bits), "codes must have"),
        ((codes, scales[:2], out, bits), "scales must have 30 elements, not 20"),
        ((codes, scales, out[..., :100].contiguous(), bits), "must be a multiple of 64"),
        ((codes, scales, out.transpose(0, 1), bits), "out must be contiguous"),
        ((codes.cpu(), scales, out, bits), "codes must be on the CUDA device"),
    ):
        with pytest.raises(RuntimeError, match=rule):
            op(*arguments)


@pytest.mark.parametrize("cycles", [0, 3_000_000])
@pytest.mark.parametrize("slots", [1, 2, 9])
@pytest.mark.parametrize("compression", BITS)
@pytest.mark.parametrize("kind", ["softmax", "bias", "modules"])
def test_the_bits_of_the_rounded_model(
    kind: str, compression: str, slots: int, cycles: int
) -> None:
    model = Blocks(KINDS[kind]).eval().bfloat16().requires_grad_(False)
    right = rounded(model, compression).cuda()
    batches = [
        torch.randn(n, D_MODEL, device="cuda", dtype=torch.bfloat16) for n in (300, 1, 0, 300)
    ]
    with torch.inference_mode():
        expected = [right(batch) for batch in batches]
        offloaded = offload_experts(model, "cuda", slots=slots, compression=compression)
        disturbed(offloaded, cycles)
        for _ in range(2):
            for batch, wanted in zip(batches, expected, strict=True):
                assert torch.equal(model(batch), wanted)
    assert offloaded.statistics.misses == 0
    offloaded.close()
    for (name, a), b in zip(model.named_parameters(), right.named_parameters(), strict=True):
        assert torch.equal(a.cpu(), b[1].cpu()), name


def test_passes_on_two_streams_share_the_workspace() -> None:
    """A pass that begins on another stream waits for the layer that still computes."""
    # In bf16: of values in fp32, one close to the middle between two steps may be rounded to the
    # other one by the twin.
    layers = [MoE(128, 128, 4, top_k=2) for _ in range(3)]
    model = torch.nn.Sequential(*layers).eval().requires_grad_(False).bfloat16()
    right = rounded(model, "int8").cuda()
    x = torch.randn(4096, 128, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        offloaded = offload_experts(model, "cuda", slots=2, compression="int8")
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            expected = right(x)
        torch.cuda.synchronize()
        for layer in layers:  # runs between decompressing and computing
            layer.experts.register_forward_pre_hook(lambda *_: torch.cuda._sleep(1_000_000))
        found = []
        for number in range(6):
            with torch.cuda.stream(streams[number % 2]):
                found.append(model(x))
        torch.cuda.synchronize()
    for output in found:
        assert torch.equal(output, expected)
    offloaded.close()


def test_host_memory_is_pinned_compressed() -> None:
    model = torch.nn.Sequential(MoE(1024, 512, 16, top_k=2)).eval().bfloat16()
    offloaded = offload_experts(model, "cuda", compression="int4")
    parts = offloaded._layers[0].stored
    assert all(part.is_pinned() for part in parts if part.nbytes >= 1 << 20)
    assert sum(part.nbytes for part in parts) == offloaded.host_bytes
    assert offloaded.host_bytes == 16 * 3 * 512 * 1024 * 34 // 64
    offloaded.close()
    assert not any(parameter.is_pinned() for parameter in model.parameters())


def test_errors_are_those_of_the_rounded_model() -> None:
    model = Blocks({}).eval().bfloat16().requires_grad_(False)
    exact, right = copy.deepcopy(model).cuda(), rounded(model, "int4").cuda()
    x = torch.randn(300, D_MODEL, device="cuda", dtype=torch.bfloat16)
    offloaded = offload_experts(model, "cuda")
    errors = compression_error(model, [x], "int4")
    offloaded.close()
    with torch.no_grad():
        a, b = exact(x).float(), right(x).float()
    assert errors.output == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
    assert all(0 < error < 0.3 for error in errors.layers.values())
