"""Plans of training runs, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.training import Activations, TrainingPlan, training_plan

D, F, E = 32, 48, 8
EXPERTS, DENSE = 2 * E * 3 * D * F, 2 * E * D
KEPT = Activations(layers=(700, 900), outside=50, logits=800, hidden=100, top_k=(2, 2))


def planned(memory: float, activations: Activations | None = KEPT, **options: Any) -> TrainingPlan:
    """Stage 1 in bf16 on 4 GPUs."""
    model = nn.Sequential(MoE(D, F, E, 2), MoE(D, F, E, 2)).to("meta")
    arguments = {"gpus": 4, "gpus_per_node": 4, "itemsize": 2, "zero": {"stage": 1}, **options}
    return training_plan(model, activations, gpu_memory=int(memory), run="A run", **arguments)


def needed(size: int) -> int:
    """Weights and gradients whole, Adam's 12 bytes of each parameter partitioned."""
    return round(4 * (DENSE + EXPERTS / size) + 12 * (DENSE + EXPERTS) / 4)


def test_activations() -> None:
    """Of two ranks a token of two experts reaches 1.5, of four 1.75."""
    assert [KEPT.kept(size) for size in (1, 2, 4)] == [2450, 2450 + 300, 2450 + 350]
    inputs = 2 * 100 + 50
    assert [KEPT.checkpointed(size) for size in (1, 2, 4)] == [
        inputs + n for n in (900, 1050, 1075)
    ]
    assert (
        replace(KEPT, logits=2000).checkpointed(4) == inputs + 2000
    )  # before any is computed again


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_smallest_size_that_fits(size: int, checkpointed: bool) -> None:
    kept = KEPT.checkpointed(size) if checkpointed else KEPT.kept(size)
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
    least = needed(4) + KEPT.checkpointed(4)
    planned(least).check()
    with pytest.raises(ConfigError, match=r"Each GPU lacks 0.0 GB: expert_parallel_size=4 needs"):
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
            itemsize=2,
            zero={"stage": 1},
            run="",
        )


def test_the_text() -> None:
    text = planned(needed(2) + KEPT.kept(2)).text()
    assert text.startswith("A run; 0.0 B parameters, 0.0 B of them in experts\n")
    assert "without checkpointing, expert_parallel_size=2 is the smallest that fits" in text
    unknown = planned(needed(2), None).text()
    assert "Activations are unknown" in unknown
    assert unknown.count("unknown") == 2 * 3 + 1
