"""Plans of passes with experts in host memory, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.planning.offload import OffloadCosts, OffloadPlan
from lightning_fastmoe.planning.offload_sizes import GIGABYTE, OffloadSizes

SIZES = OffloadSizes((2 * GIGABYTE,) * 10, 3 * GIGABYTE, cache_per_token=100_000)
COSTS = OffloadCosts(50e9, layers=0.3, rest=0.1, activations=GIGABYTE, step=0.02)
PLAN = OffloadPlan(SIZES, COSTS, tokens=32_000, sequences=64, gpu_memory=24 * GIGABYTE)


def test_a_pass_that_waits_for_the_link() -> None:
    assert PLAN.copied == 20 * GIGABYTE
    assert PLAN.copying == pytest.approx(0.4)
    slower = replace(PLAN, costs=replace(COSTS, link=25e9))
    assert slower.seconds == pytest.approx(0.8)
    assert slower.limit == "the link"
    assert slower.hiding_tokens == 64_000
    assert slower.on_gpu == (3 + 2 * 2 + 1) * GIGABYTE


def test_a_pass_that_waits_for_the_gpu() -> None:
    faster = replace(PLAN, costs=replace(COSTS, link=100e9))
    assert faster.seconds == pytest.approx(0.4)
    assert faster.limit == "the GPU"
    assert faster.hiding_tokens == 16_000


def test_resident_layers() -> None:
    plan = replace(PLAN, resident=4)
    assert plan.copied == 12 * GIGABYTE
    assert plan.on_gpu == (3 + 2 * 2 + 4 * 2 + 1) * GIGABYTE
    more = plan.with_more_memory()
    assert (more.resident, more.gpu_memory) == (8, 32 * GIGABYTE)
    assert more.copied == 0  # both layers left have a slot
    assert replace(more, slots=1).copied == 4 * GIGABYTE
    assert replace(PLAN, resident=9).with_more_memory().resident == 10
    whole = replace(PLAN, resident=10)
    assert (whole.copied, whole.slot_bytes, whole.limit) == (0, 0, "the GPU")


COMPRESSED = replace(SIZES, compressed=(GIGABYTE // 2,) * 10, scratch=GIGABYTE // 10)


def test_compressed_experts() -> None:
    """A quarter is copied; each pass decompresses all, whatever its tokens."""
    plan = replace(PLAN, sizes=COMPRESSED, costs=replace(COSTS, decompression=1e12))
    assert (plan.copied, plan.host_bytes) == (5 * GIGABYTE, 5 * GIGABYTE)
    assert plan.slot_bytes == (2 * 0.5 + 2 + 0.1) * GIGABYTE
    assert plan.on_gpu == 3 * GIGABYTE + plan.slot_bytes + GIGABYTE
    assert plan.copying == pytest.approx(0.1)
    assert plan.decompressing == pytest.approx(0.02)
    assert plan.computing == pytest.approx(0.42)
    assert plan.hiding_tokens == 32_000 * 0.08 / 0.4
    assert replace(plan, generated=10).generating == pytest.approx(10 * 0.1)
    assert "host      5.0 GB  experts, 20.0 GB until compressed" in plan.text()
    assert "3.1 GB in 2 slots and a workspace" in plan.text()
    assert "computation 0.42 s (assumed; --measure measures them), 0.02 s of it" in plan.text()
    part = replace(plan, resident=4)
    assert part.copied == 3 * GIGABYTE
    assert part.host_bytes == (3 + 8) * GIGABYTE
    assert part.on_gpu == (3 + 8 + 3.1 + 1) * GIGABYTE
    whole = replace(plan, resident=10)
    assert (whole.copied, whole.slot_bytes, whole.decompressing) == (0, 0, 0)
    with pytest.raises(ConfigError, match="experts take 20.0 GB until they are compressed, and"):
        plan.check(15 * GIGABYTE)


@pytest.mark.parametrize("compression", ["int8", "int4"])
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_sizes_of_compressed_experts_are_what_offloading_takes(
    compression: str, resident: int
) -> None:
    """Layers of two sizes, with biases."""
    many: dict[str, Any] = {"top_k": 2, "bias": True, "activation": "gelu"}
    model = nn.Sequential(
        MoE(128, 64, 8, **many), MoE(128, 128, 4, **many), MoE(128, 64, 8, **many)
    )
    sizes = OffloadSizes.of(model.eval(), compression=compression)
    plan = replace(PLAN, sizes=sizes, slots=1, resident=resident)
    offloaded = offload_experts(
        model, "cpu", slots=1, resident_layers=resident, compression=compression
    )
    assert offloaded.slot_bytes == plan.slot_bytes
    assert offloaded.host_bytes == plan.copied
    assert offloaded.resident_bytes == plan.resident_bytes
    before = offloaded.statistics.copied
    with torch.inference_mode():
        model(torch.randn(3, 128))
    assert offloaded.statistics.copied - before == plan.copied


def test_several_gpus() -> None:
    """Each copies a part over its link, and receives the others at 300 GB/s."""
    plan = replace(PLAN, costs=replace(COSTS, link=25e9), gpus=2)
    assert plan.copying == pytest.approx(0.4)
    assert replace(plan, gpus=8).copying == pytest.approx(0.1)
    assert replace(plan, gpus=32).copying == pytest.approx(20 * 31 / 32 / 300)
    assert "32,000 tokens on each of 2 GPUs, 160,000 tokens/s" in plan.text()
    assert "copies 0.40 s at 25.0 GB/s on each of 2 GPUs" in plan.text()


def test_generation() -> None:
    plan = replace(PLAN, generated=64)
    assert plan.cache_bytes == 100_000 * (32_000 + 64 * 64)
    assert plan.generating == pytest.approx(64 * 0.4)
    assert "64 tokens for each of 64 sequences, 160 tokens/s" in plan.text()
    assert PLAN.cache_bytes == 0


def test_steps_of_few_sequences() -> None:
    """4 tokens that choose 8 of 128 evenly leave each expert alone with (15/16)^4."""
    few = replace(SIZES, choices=((128, 8),) * 10)
    plan = replace(PLAN, sizes=few, sequences=4, generated=10)
    share = 1 - (15 / 16) ** 4
    assert plan.copied_by_step == pytest.approx(20 * GIGABYTE * share)
    assert plan.generating == pytest.approx(10 * (20 / 50 * share + 0.02))
    assert "a layer's tokens choose about 29 of 128 experts if they choose evenly" in plan.text()
    cached = replace(plan, expert_cache=5 * GIGABYTE)
    assert cached.copied_by_step == pytest.approx(20 * GIGABYTE * share * 0.75)
    assert cached.on_gpu == plan.on_gpu + 5 * GIGABYTE
    many = replace(plan, sequences=64, expert_cache=5 * GIGABYTE)
    assert many.copied_by_step == 20 * GIGABYTE
    assert many.generating == pytest.approx(10 * 0.4)
    assert "a step copies 20.0 GB: all experts" in many.text()
    assert replace(plan, resident=10).copied_by_step == 0


def test_a_pass_of_few_tokens() -> None:
    """It computes after it copies what its tokens chose, unless all layers have a slot."""
    few = replace(SIZES, choices=((128, 8),) * 10)
    plan = replace(PLAN, sizes=few, sequences=4, tokens=4)
    assert plan.copied == pytest.approx(20 * GIGABYTE * (1 - (15 / 16) ** 4))
    assert plan.seconds == pytest.approx(plan.copying + plan.computing)
    assert plan.hiding_tokens == 4  # 20 GB at 50 GB/s, while it computes for as long
    kept = replace(plan, slots=10)
    assert (kept.copied, kept.seconds) == (0, kept.computing)
    assert "a step copies 0.0 GB: what stays on the GPU" in replace(kept, generated=2).text()
    gathered = replace(plan, gpus=2)  # exchanges bring whole layers
    assert gathered.copied == 20 * GIGABYTE
    assert gathered.seconds == max(gathered.copying, gathered.computing)
    chunks = replace(plan, chunk=1, generated=10)  # a layer is held for all chunks
    assert chunks.copied_by_step == 20 * GIGABYTE


def test_groups_of_experts() -> None:
    """The largest of 3 groups of 8 experts has 3 of them."""
    sizes = replace(SIZES, choices=((8, 2),) * 10)
    plan = replace(PLAN, sizes=sizes, groups=3)
    assert plan.slot_bytes == 2 * 2 * GIGABYTE * 3 // 8
    assert replace(plan, resident=10).slot_bytes == 0
    assert replace(plan, slots=9, resident=9).slot_bytes == 3 * 2 * GIGABYTE * 3 // 8
    assert "in 2 slots of 1/3 layer, 0.0 GB resident" in plan.text()


def test_a_cache_in_host_memory() -> None:
    """It shares the link with experts: written beside them in the pass, read in each step."""
    plan = replace(PLAN, generated=64, chunk=16, host_cache=True)
    cache = 100_000 * (32_000 + 64 * 64)
    assert (plan.cache_on_host, plan.cache_on_gpu) == (cache, 2 * cache * 16 // (10 * 64))
    assert plan.on_gpu == (3 + 2 * 2 + 1) * GIGABYTE + plan.cache_on_gpu
    assert plan.copying == pytest.approx((20e9 - 3.2e9) / 50e9 + 3.2e9 / (0.72 * 50e9))
    assert plan.generating == pytest.approx(64 * (20e9 + 100_000 * (32_000 + 64 * 32)) / 50e9)
    assert replace(plan, chunk=None).cache_on_gpu == 2 * cache // 10
    wide = replace(plan, sizes=replace(SIZES, layers=20))
    assert wide.cache_on_gpu == plan.cache_on_gpu // 2
    text = plan.text()
    assert "23.6 GB  experts, 3.6 GB of it keys and values" in text
    assert "32,000 tokens in chunks of 16 sequences, 75,314 tokens/s" in text
    assert "1.0 GB activations, 0.2 GB keys and values" in text
    plan.check(24 * GIGABYTE)
    with pytest.raises(ConfigError, match=r"lacks 0.6 GB: .* 20.0 GB and keys and values 3.6 GB"):
        plan.check(23 * GIGABYTE)


def test_what_would_need_less_is_said() -> None:
    def reason(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            replace(PLAN, gpu_memory=2 * GIGABYTE, **options).check(90 * GIGABYTE)
        return str(error.value).rpartition("Use ")[2]

    fewer = "fewer tokens per pass, slots or resident layers"
    assert reason(chunk=1) == f"{fewer}."
    assert reason(chunk=2) == f"{fewer}, or smaller chunks (--chunk)."
    host = "or a cache in host memory (--host-cache)."
    groups = "or more groups of experts (--groups)"
    assert reason(generated=1) == f"{fewer}, {groups}, or chunks (--chunk), {host}"
    assert reason(groups=2) == f"{fewer}, {groups}."
    assert reason(generated=1, chunk=1, host_cache=True) == f"{fewer}."


def test_what_does_not_fit_is_refused() -> None:
    PLAN.check(20 * GIGABYTE)
    with pytest.raises(ConfigError, match=r"The GPU lacks 2.0 GB: a pass of 32,000 .* 8.0 GB"):
        replace(PLAN, gpu_memory=6 * GIGABYTE).check(20 * GIGABYTE)
    with pytest.raises(ConfigError, match=r"The host lacks 5.0 GB: the experts take 20.0 GB"):
        PLAN.check(15 * GIGABYTE)


def test_sizes_of_a_model() -> None:
    model = nn.ModuleList([nn.Linear(3, 5), MoE(8, 4, 6), MoE(8, 4, 2, shared_expert=4)])
    sizes = OffloadSizes.of(model)
    assert sizes.experts == (6 * 3 * 4 * 8 * 4, 2 * 3 * 4 * 8 * 4)
    assert sizes.choices == ((6, 2), (2, 2))
    modules = MoE(8, num_experts=2, expert=lambda d: nn.Linear(d, d))
    assert OffloadSizes.of(modules).choices == ((2, 0),)
    assert sizes.rest == 4 * (3 * 5 + 5 + 6 * 8 + 2 * 8 + 3 * 4 * 8)
    with pytest.raises(ConfigError, match="Linear has no experts"):
        OffloadSizes.of(nn.Linear(2, 2))
