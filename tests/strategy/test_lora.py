"""Adapters of MoE layers on ranks: one process's numbers, and checkpoints for any ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategy import lora_runs as runs
from strategy.models import Case, build_net, loss_of, reference

from lightning_fastmoe.checkpoint.whole import read_whole
from lightning_fastmoe.nn import merge_lora


@pytest.mark.parametrize(
    ("world", "ep", "stage", "late", "dispatcher"),
    [
        (2, 2, 1, True, "symmetric"),  # which computes with the experts' stacks itself if it can
        (4, 2, 2, False, "auto"),
        (4, 4, 3, True, "auto"),
    ],
)
def test_trains_to_the_numbers_of_one_process(
    world, ep, stage, late, dispatcher, rank_pool
) -> None:
    case = Case(world, ep, stage, accumulate=2, in_configure_model=late)
    net = runs.adapted(case)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    expected = reference(case, net)
    for norms, weights in rank_pool.run(
        runs.train, world, case, None, None, runs.ALPHA, dispatcher
    ):
        assert norms == pytest.approx(expected.norms, rel=1e-5)
        for found, wanted in zip(weights, expected.weights, strict=True):
            assert found.keys() == wanted.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
                is_trained = "_lora_" in name or name == "head.weight"
                assert torch.equal(value, before[name]) is not is_trained, name


def test_resumes_on_other_ranks_with_its_alpha_alone(rank_pool, tmp_path) -> None:
    path = str(tmp_path / "saved")
    case = Case(2, 2, 3, steps=4, batches_per_epoch=2, in_configure_model=True)
    case = replace(case, extra={"exclude_frozen_parameters": True})
    saved = rank_pool.run(runs.train, 2, case, None, path)[0][1][-1]
    state = read_whole(tmp_path / "saved")
    weights = state["state_dict"]
    trained = {n for n in saved if "_lora_" in n or n == "head.weight"}
    assert set(weights) == {f"net.{name}" for name in trained}
    for name in trained:
        assert torch.equal(weights[f"net.{name}"], saved[name]), name
    scale = runs.ALPHA / runs.RANK
    assert state["fastmoe_adapter_scales"] == {
        f"net.{name}": scale for name in trained if name.endswith("_lora_a")
    }
    case = replace(case, epochs=2)
    whole = rank_pool.run(runs.train, 2, case)[0][1][-1]
    other = replace(case, ep=1, stage=1, extra={})
    for again in (case, other):
        resumed = rank_pool.run(runs.train, 2, again, path)[0][1][-1]
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    for said in rank_pool.run(runs.error_of, 2, case, path, 6.0):
        assert "multiplied by alpha / rank = 1.5, and here by 2.0: give the same alpha" in said


def test_frozen_adapters_are_refused(rank_pool) -> None:
    for said in rank_pool.run(runs.error_of_frozen_adapters, 2, Case(2, 2, 2, 1)):
        assert said.startswith("ConfigError: net.moes.0.experts.")
        assert "call it before add_lora()" in said


def test_merged_weights_load_into_a_model_without_adapters() -> None:
    case = Case()
    net = runs.adapted(case)
    batch = torch.randn(3, 5, 6)
    want = loss_of(net.eval(), batch)
    merge_lora(net)
    plain = build_net(case.num_experts, case.coefficients)
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(loss_of(plain.eval(), batch), want)
