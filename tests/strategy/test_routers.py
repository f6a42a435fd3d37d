"""Each router, capacity and loss on 2 and 4 ranks trains to the numbers of one plain process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategy import router_runs as runs
from strategy.exactness import assert_same
from strategy.router_runs import RouterCase

from lightning_fastmoe.nn.router import ROUTERS
from lightning_fastmoe.nn.router.losses import LOSSES
from lightning_fastmoe.testing import RankError

NOTHING = {"load_balancing": 0.0, "z_loss": 0.01}
"""Losses whose global value is the mean over ranks."""

WHOLE = {
    # The twin sees all ranks' tokens at once: what is drawn and chosen must not depend on ranks.
    "noisy": {"router": "noisy", "router_options": {"init_std": 0.5}, "importance": 0, "load": 0},
    "switch": {"router": "switch", "router_options": {"jitter": 0.2}, **NOTHING},
    "dc": {"router": "dc", **NOTHING},
    "sigmoid": {
        "router": "sigmoid",
        "router_options": {"num_groups": 4, "limit_groups": 2},
        "load_balancing": 0,
        "sequence_balancing": 0.3,
    },
    "cosine": {
        "router": "cosine",
        # On a circle, the default for 4 experts, gradients are small differences of large numbers.
        "router_options": {"d_router": 8},
        **NOTHING,
        "global_balancing": 0.3,
    },
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.5},
    "soft": {"router": "soft", "router_options": {"slots_per_expert": 2}},
    "hash": {"router": "hash", "top_k": 2},
    "swipe": {"router": "swipe", "router_options": {"num_groups": 4}, **NOTHING},
    "base": {"router": "base", "router_options": {"over": "global"}},
    "sinkhorn": {"router": "sinkhorn", "router_options": {"over": "global"}, "top_k": 2},
    "capacity by position": {"capacity_factor": 0.7, "capacity_over": "global", **NOTHING},
    "capacity by score": {
        "capacity_factor": 0.7,
        "capacity_over": "global",
        "drop_by": "score",
        **NOTHING,
    },
    "bias": {"router": "softmax", "router_options": {"balance_bias": True}, **NOTHING},
    "modules": {"expert": "class", "capacity_factor": 0.9, "capacity_over": "global", **NOTHING},
    "different modules": {"expert": "list", **NOTHING},
    "shared": {"shared_expert": 6, "shared_expert_gate": True, **NOTHING},
    "clamped": {"activation": "clamped_swiglu", "bias": True, **NOTHING},
}

BY_RANK = {
    # What these do depends on the tokens of one rank by definition.
    "softmax": {"capacity_factor": 0.8, "drop_by": "score", "importance": 0.2},
    "noisy, its losses": {"router": "noisy", "router_options": {"init_std": 0.5}},
    "gshard": {"router": "gshard"},
    "expert choice by rank": {"router": "expert_choice", "router_options": {"over": "rank"}},
    "base by rank": {"router": "base"},
    "sinkhorn by rank": {"router": "sinkhorn", "top_k": 2},
    "topology": {"router": "topology", "router_options": {"outgoing_fraction": 0.4}, "top_k": 2},
}


def acting(moe: dict) -> set[str]:
    """The losses of a layer with these arguments."""
    usual = ROUTERS[moe.get("router", "softmax")].default_losses
    return {n for n in LOSSES if moe.get(n, LOSSES[n].coefficient if n in usual else 0)}


# What has no line above is run as it comes.
LISTED = [*WHOLE.values(), *BY_RANK.values()]
WHOLE |= {
    name: {"router": name, **{loss: NOTHING.get(loss, 0.0) for loss in cls.default_losses}}
    for name, cls in ROUTERS.items()
    if name not in {moe.get("router", "softmax") for moe in LISTED}
}
for name in LOSSES.keys() - set().union(*map(acting, LISTED)):
    (WHOLE if LOSSES[name].uses_batch else BY_RANK)[name] = {**NOTHING, name: 0.2}


def make(name: str, world: int, **kwargs) -> RouterCase:
    whole = name in WHOLE
    moe = (WHOLE if whole else BY_RANK)[name]
    defaults = {"world": world, "ep": world, "steps": 2, "tokens": 6, "moe": moe, "whole": whole}
    if name in ("bias", "sigmoid"):
        defaults["bias_rate"] = 0.02
    if name == "topology":
        defaults["nodes"] = world
    return RouterCase(**{**defaults, **kwargs})


def check(rank_pool, case: RouterCase) -> None:
    expected = runs.twin(case)
    results = rank_pool.run(runs.run, case.world, case, ranks_per_node=case.world // case.nodes)
    for result in results:
        assert_same(result.trace, expected.trace)
        assert result.buffers.keys() == expected.buffers.keys()
        for buffer, value in expected.buffers.items():
            torch.testing.assert_close(result.buffers[buffer], value, msg=buffer)
    for layer, counts in enumerate(expected.counts):
        routed, kept = sum(result.counts[layer] for result in results)
        assert torch.equal(routed, counts[0])
        assert torch.equal(kept, counts[1])
        assert int((routed - kept).min()) >= 0
        if case.moe.get("capacity_factor", 2) < 1:
            assert int(kept.sum()) < int(routed.sum())


def test_every_router_and_loss_is_covered():
    cases = [*WHOLE.values(), *BY_RANK.values()]
    assert {moe.get("router", "softmax") for moe in cases} == set(ROUTERS)
    assert set().union(*map(acting, cases)) == set(LOSSES)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", [*WHOLE, *BY_RANK])
def test_expert_parallel_equals_one_process(rank_pool, name, world):
    # A node must hold top_k experts.
    experts = (8, 8) if name == "topology" else (4, 8)
    check(rank_pool, make(name, world, num_experts=experts, accumulate=2 if world == 2 else 1))


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("dc", 1),
        ("dc", 3),
        ("noisy", 3),
        ("expert_choice", 1),
        ("expert_choice", 3),
        ("soft", 3),
        ("bias", 1),
        ("bias", 3),
        ("modules", 1),
        ("modules", 3),
        ("different modules", 1),
        ("different modules", 3),
        ("shared", 3),
        ("cosine", 3),
        ("sinkhorn", 3),
    ],
)
def test_zero_stages(rank_pool, name, stage):
    check(rank_pool, make(name, 2, stage=stage, accumulate=2, in_configure_model=stage == 3))


@pytest.mark.parametrize("name", ["dc", "cosine", "swipe", "base", "capacity by score", "modules"])
def test_data_parallel_beside_expert_parallel(rank_pool, name):
    check(rank_pool, make(name, 4, ep=2, in_configure_model=True))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("dc", "torch"),
        ("dc", "deepspeed"),
        ("noisy", "torch"),
        ("noisy", "deepspeed"),
        ("bias", "torch"),
        ("cosine", "torch"),
        ("modules", "torch"),
        ("sinkhorn", "torch"),
        ("base", "deepspeed"),
    ],
)
def test_activation_checkpointing_changes_nothing(rank_pool, name, how):
    check(rank_pool, make(name, 2, recompute=how, accumulate=2))


def test_random_draws_matter_above():
    """Else equal numbers would say nothing about the draws."""
    for name in ("noisy", "switch", "dc"):
        case = make(name, 2)
        quiet = {"noise": 0.0, "jitter": 0.0, "random_second": False}
        key = {"noisy": "noise", "switch": "jitter", "dc": "random_second"}[name]
        options = {**case.moe.get("router_options", {}), key: quiet[key]}
        other = replace(case, moe={**case.moe, "router_options": options})
        a, b = runs.twin(case).trace.losses, runs.twin(other).trace.losses
        assert abs(a[-1] - b[-1]) > 1e-5 * abs(b[-1]), name


@pytest.mark.parametrize(("name", "stage"), [("bias", 2), ("bias", 3), ("switch", 2), ("dc", 3)])
def test_biases_and_draws_go_on_after_a_checkpoint(rank_pool, tmp_path, name, stage):
    """A bias that restarts at zero, or draws that repeat, would change the losses."""
    case = make(name, 2, stage=stage, steps=4, accumulate=2)
    for whole, resumed in rank_pool.run(runs.fit_and_resume, 2, case, str(tmp_path / "c.ckpt")):
        assert resumed[0] == pytest.approx(whole[0], rel=1e-6)
        for buffer, value in whole[1].items():
            assert value.any(), buffer
            assert torch.equal(resumed[1][buffer], value), buffer


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("name", "world", "ep"),
    [("switch", 2, 2), ("cosine", 2, 1), ("capacity by position", 4, 2), ("shared", 2, 2)],
)
def test_a_rank_that_leaves_a_layer_out_stops_all(rank_pool, name, world, ep, layer):
    """Ranks that wait for it in an exchange of counts find out, rather than wait for ever."""
    case = make(name, world, ep=ep, num_experts=(4, 4))
    with pytest.raises(RankError, match="different exchanges") as error:
        rank_pool.run(runs.leave_out, world, case, 1, layer, timeout=60.0)
    assert {kind for kind, _ in error.value.errors.values()} == {"ExchangeError"}
    assert len(error.value.errors) == world


def test_module_experts_go_on_after_a_checkpoint(rank_pool, tmp_path):
    case = make("modules", 2, steps=4)
    for whole, resumed in rank_pool.run(runs.fit_and_resume, 2, case, str(tmp_path / "c.ckpt")):
        assert resumed[0] == whole[0]
