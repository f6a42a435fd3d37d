"""Generation with sharded experts: each rank's own prompts, and one process's tokens."""

from __future__ import annotations

import pytest
import torch
from huggingface import generation_runs as runs
from huggingface.sharding_runs import Run, make_model


@pytest.mark.parametrize(("ep", "name"), [(4, "qwen3_moe"), (2, "gpt_oss")])
def test_each_rank_generates_what_one_process_does(ep, name, rank_pool) -> None:
    """Prompts of other lengths and numbers, or none; other ends, seeds and numbers of passes."""
    model = runs.make(name)
    lengths = set()
    for rank, found in enumerate(rank_pool.run(runs.generates, 4, name, ep)):
        for how, tokens in zip(runs.OPTIONS, found, strict=True):
            wanted = runs.generate(model, rank, how)
            if wanted is None:
                assert tokens is None
                continue
            assert torch.equal(tokens, wanted), (rank, how)
            lengths.add(tokens.shape[1] - max(runs.LENGTHS[rank]))
    assert len(lengths) > 2


@pytest.mark.parametrize(
    ("how", "own"),
    [
        ("before", "ValueError: no prompt"),
        ("after", "ValueError: a bad token"),
        ("interrupt", "KeyboardInterrupt: "),
        ("trains", "ConfigError: model.layers.0.mlp was run for training"),
    ],
)
def test_an_error_on_one_rank_ends_the_function_on_all(how, own, rank_pool) -> None:
    for rank, said in enumerate(rank_pool.run(runs.fails, 2, 2, how, timeout=60)):
        if rank == 1:
            assert said.startswith(own)
        else:
            start = "ExchangeError: The function of on_each_rank failed on rank 1: "
            assert said.startswith(start + own)


def test_ranks_in_different_layers_are_refused_together(rank_pool) -> None:
    for said in rank_pool.run(runs.fails, 2, 2, "other layer", timeout=60):
        assert said.startswith("ExchangeError: on_each_rank: ranks are in different MoE layers (")
        assert "model.layers.0.mlp, model.layers.1.mlp" in said


def test_our_own_layers_sample_alike(rank_pool) -> None:
    model = runs.OwnLayers().eval()
    for rank, found in enumerate(rank_pool.run(runs.samples_from_own_layers, 4)):
        with torch.no_grad():
            assert found == runs.continued(model, rank)


def test_in_training_and_not_at_stage_3(rank_pool) -> None:
    for rank, (found, weights) in enumerate(rank_pool.run(runs.generates_in_training, 2, Run())):
        model = make_model(Run(), "eager").eval()
        model.load_state_dict(weights)
        assert torch.equal(found, runs.generate(model, rank, "greedy"))
    for said in rank_pool.run(runs.generates_in_training, 2, Run(stage=3)):
        assert said.startswith("ConfigError: on_each_rank does not work at stage 3")
