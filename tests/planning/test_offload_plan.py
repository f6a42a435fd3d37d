"""Plans of passes with experts in host memory, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.offload import GIGABYTE, OffloadCosts, OffloadPlan, OffloadSizes

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
    assert sizes.rest == 4 * (3 * 5 + 5 + 6 * 8 + 2 * 8 + 3 * 4 * 8)
    with pytest.raises(ConfigError, match="Linear has no experts"):
        OffloadSizes.of(nn.Linear(2, 2))
