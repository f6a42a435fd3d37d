"""Plans of training runs, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.exchange import ExchangePlan, LayerShape
from lightning_fastmoe.planning.training import Activations, TrainingPlan, training_plan

D, F, E, T = 256, 512, 8, 100
EXPERTS, DENSE = 2 * E * 3 * D * F, 2 * E * D
KEPT = Activations(layers=(700_000, 900_000), outside=5000, logits=9_000_000, hidden=10_000)
LAYER = LayerShape(T, D, 2 * F, F, E, 2, 2)


def planned(memory: float, activations: Activations | None = KEPT, **options: Any) -> TrainingPlan:
    """Stage 1 in bf16 on 4 GPUs."""
    model = nn.Sequential(MoE(D, F, E, 2), MoE(D, F, E, 2)).to("meta")
    arguments = {"gpus": 4, "gpus_per_node": 4, "tokens": T, "itemsize": 2, "zero": {"stage": 1}}
    arguments |= options
    return training_plan(model, activations, gpu_memory=int(memory), run="A run", **arguments)


def exchange(size: int) -> ExchangePlan:
    """Of both layers."""
    return ExchangePlan([LAYER, LAYER], size)


def needed(size: int) -> int:
    """Weights and gradients whole, Adam's 12 bytes of each parameter partitioned; and buffers."""
    held = round(4 * (DENSE + EXPERTS / size) + 12 * (DENSE + EXPERTS) / 4)
    return held + exchange(size).buffers


def test_the_exchange() -> None:
    """A token of 2 of 8 experts reaches 11/7 of two ranks: C(4, 2) of C(8, 2) leave one out."""
    assert (exchange(1).kept, exchange(1).buffers) == ([0, 0], 0)
    rows = round(T * 11 / 7)
    more = rows + rows // 16 + 1  # launched ahead of the counts
    pairs = 200 + 200 // 16 + 1
    received = more * (2 * D + 2 * (4 + 16)) + (pairs - 200) * 4 * F - 200 * (4 + 16)
    assert exchange(2).kept == [received + T * (2 * 16 + 2 * 4)] * 2
    # Two halves of a block for each of two ranks: T rows of 512 and 16 bytes are one of 64 KiB.
    assert exchange(2).buffers == 4 * 2**16 + 4 * 8 * 4102 + 10 * 128


def test_activations() -> None:
    """Logits and a layer's backward pass follow each other."""
    for size in (1, 2, 4):
        plan = exchange(size)
        kept = 1_600_000 + sum(plan.kept) + 5000
        assert KEPT.kept(plan) == kept + 9_000_000
        assert replace(KEPT, logits=0).kept(plan) == kept + plan.working
        again = 900_000 + max(plan.kept) + plan.working
        assert again < 9_000_000
        assert KEPT.checkpointed(plan) == 2 * 10_000 + 5000 + 9_000_000
        assert replace(KEPT, logits=0).checkpointed(plan) == 2 * 10_000 + 5000 + again


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_smallest_size_that_fits(size: int, checkpointed: bool) -> None:
    kept = (KEPT.checkpointed if checkpointed else KEPT.kept)(exchange(size))
    memory = needed(size) + kept
    found = planned(memory).smallest(checkpointed=checkpointed)
    assert found is not None
    assert (found.size, found.needed(checkpointed=checkpointed)) == (size, memory)
    larger = planned(memory - 1).smallest(checkpointed=checkpointed)
    assert (larger.size if larger else None) == {1: 2, 2: 4, 4: None}[size]


def test_groups_stay_in_a_node() -> None:
    assert [one.size for one in planned(10**9, gpus_per_node=2).sizes] == [1, 2]
    assert [one.size for one in planned(10**9, gpus=1, gpus_per_node=1).sizes] == [1]


def test_what_does_not_fit_is_refused() -> None:
    least = needed(4) + KEPT.checkpointed(exchange(4))
    planned(least).check()
    with pytest.raises(ConfigError, match=r"Each GPU lacks 1 B: expert_parallel_size=4 needs"):
        planned(least - 1).check()
    with pytest.raises(ConfigError, match="8 GPUs can't be on nodes of 3"):
        planned(1, gpus=8, gpus_per_node=3)
    with pytest.raises(ConfigError, match="Linear has no experts"):
        training_plan(
            nn.Linear(2, 2),
            None,
            gpus=1,
            gpus_per_node=1,
            gpu_memory=1,
            tokens=1,
            itemsize=2,
            zero={"stage": 1},
            run="",
        )


def test_the_text() -> None:
    text = planned(needed(2) + KEPT.kept(exchange(2))).text()
    assert text.startswith("A run; 6.30 M parameters, 6.29 M of them in experts\n")
    assert "without checkpointing, expert_parallel_size=2 is the smallest that fits" in text
    assert (
        'dispatcher "symmetric", which adds to the activations 0.2 MB at 2, 0.3 MB at 4\n' in text
    )
    unknown = planned(needed(2), None).text()
    assert "Activations are unknown" in unknown
    assert unknown.count("unknown") == 2 * 3 + 1
