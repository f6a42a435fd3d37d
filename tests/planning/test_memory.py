"""The plan of a run's memory against what DeepSpeed really allocates."""

from __future__ import annotations

import pytest
import torch
from planning import memory_runs as runs
from strategy.models import Case, build_net
from torch import nn

from lightning_fastmoe.planning.memory import Group, optimizer_state_bytes, plan

EXPERTS = (32, 64)
WHOLE = sum(p.numel() for p in build_net(EXPERTS, (0.0, 0.0)).parameters())
EXTRA = {"reduce_bucket_size": 5000}


@pytest.mark.parametrize(
    ("world", "ep", "stage", "precision", "optimizer"),
    [
        (2, 1, 1, "32-true", "AdamW"),
        (2, 2, 1, "bf16-mixed", "AdamW"),
        (2, 1, 2, "bf16-mixed", "AdamW"),
        (4, 2, 2, "32-true", "SGD"),
        (2, 2, 3, "32-true", "AdamW"),
        (4, 2, 3, "bf16-mixed", "SGD"),
    ],
)
def test_plan_is_what_deepspeed_allocates(rank_pool, world, ep, stage, precision, optimizer):
    case = Case(world, ep, stage, 2, num_experts=EXPERTS, precision=precision, steps=2, extra=EXTRA)
    results = rank_pool.run(runs.allocate, world, case, optimizer)
    for size, memory, _ in results:
        assert size.total == WHOLE
        assert memory == results[0][1]
    memory = results[0][1]
    assert memory.state_bytes == {"AdamW": 8.0, "SGD": 4.0}[optimizer]
    for name in ("weights", "gradients", "optimizer", "buffers"):
        real = max(found[name] for _, _, found in results)
        assert getattr(memory.total, name) == pytest.approx(real, rel=0.02), name


def make_plan(group, stage, **config):
    memory = plan([group], stage=stage, itemsize=2, state_bytes=8.0, config=config)
    assert memory.experts.device == 0
    return memory


def test_by_hand():
    """One billion parameters in bf16 with Adam on 64 ranks, as in the ZeRO paper's figure 1."""
    group = Group([10**6] * 1000, 64)
    bucket = {"reduce_bucket_size": 1000}
    one = make_plan(group, 1, **bucket).dense
    assert (one.weights, one.gradients) == (2 * 10**9, 2 * 10**9)
    assert one.optimizer == 12 * 10**9 / 64
    two = make_plan(group, 2, **bucket).dense
    assert two.weights == 2 * 10**9
    assert two.gradients == 2 * 17 * 10**6  # 15.625 million each: 17 reach into some rank's part
    three = make_plan(group, 3, **bucket).dense
    assert three.weights == three.gradients == 2 * 10**9 / 64
    assert three.optimizer == 12 * 10**9 / 64


def test_small_parameters_stay_whole_in_stage_3():
    assert make_plan(Group([100, 1000], 4), 3).dense.weights == 2 * (275 + 1100)
    option = {"stage3_param_persistence_threshold": 500}
    assert make_plan(Group([100, 1000], 4), 3, **option).dense.weights == 2 * (275 + 100)


def test_what_is_offloaded_is_not_on_the_device():
    offload = {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    memory = make_plan(Group([1000], 2), 3, **offload)
    assert memory.total.on_host == {"optimizer"}
    assert memory.total.optimizer == 500 * 12
    assert memory.total.device == 2 * 500 + 2 * 1000 + 2 * 500 + 2 * 1000


def test_frozen_parameters_have_weights_alone():
    for stage in (1, 2, 3):
        dense = make_plan(Group([10**6], 2, requires_grad=False), stage).dense
        assert dense.weights == 2 * 10**6 // (2 if stage == 3 else 1)
        assert dense.gradients == dense.optimizer == 0


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda p: torch.optim.Adam(p), 8),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4),
        (lambda p: Stubborn(p, {}), None),
    ],
)
def test_state_bytes(make, want):
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = make([parameter])
    assert optimizer_state_bytes(optimizer) == want
    assert not optimizer.state
    assert parameter.tolist() == torch.ones(3, 3).tolist()


class Stubborn(torch.optim.Optimizer):
    """Refuses what isn't a matrix."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dim() == 2
