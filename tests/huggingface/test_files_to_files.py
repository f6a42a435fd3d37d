"""From transformers' files to transformers' files, by way of two sets of ranks and a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface.loading_runs import finetunes_epochs
from huggingface.sharding_runs import Run, assert_close, make_batches, make_model, reference
from transformers import AutoModelForCausalLM

from lightning_fastmoe.cli.entry import main

# Family, stage and whether its files have a tensor per expert; then ranks, how many of them
# divide the experts, and the stage.
CASES = [
    ("mixtral", 1, True, 4, 4, 2),
    ("qwen3_moe", 2, True, 4, 2, 3),
    ("olmoe", 3, False, 1, 1, 1),
    ("deepseek_v3", 2, True, 1, 1, 2),
    ("gpt_oss", 3, True, 4, 2, 1),
]


@pytest.mark.parametrize(("name", "stage", "original", "world", "ep", "other"), CASES)
def test_trained_weights_and_logits(
    name: str,
    stage: int,
    original: bool,
    world: int,
    ep: int,
    other: int,
    tmp_path: Path,
    rank_pool,
) -> None:
    run = Run(name, stage=stage, accumulate=2, steps=3)
    start, first, last, out = (tmp_path / part for part in ("start", "1.ckpt", "2.ckpt", "out"))
    make_model(run).save_pretrained(start, save_original_format=original)
    rank_pool.run(finetunes_epochs, run.world, run, start, 2, first)
    resumed = replace(run, world=world, ep=ep, stage=other, accumulate=4 // world)
    ends = rank_pool.run(finetunes_epochs, world, resumed, start, 3, last, first)
    command = ["checkpoint", "export", str(last), str(out), "--config", str(start)]
    assert main(command) == 0

    model = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager").eval()
    twin = make_model(run, "eager").eval()
    right = reference(run).weights
    assert len(right) == 3
    for weights in ends:
        assert len(weights) == 1  # the step after resuming
        assert weights[0].keys() == dict(model.named_parameters()).keys()
        for key, value in model.named_parameters():
            assert torch.equal(value, weights[0][key]), key
    for key, value in model.named_parameters():
        assert_close(value.detach(), right[2][key], key)
    twin.load_state_dict(ends[0][0], strict=False)  # has parameters; buffers are not trained
    inputs = make_batches(run)[0][0][0]
    with torch.no_grad():
        logits, expected = model(**inputs).logits, twin(**inputs).logits
        twin.load_state_dict(right[1], strict=False)
        before = twin(**inputs).logits
    assert torch.equal(logits, expected)
    assert (logits - before).abs().max() > 1e-3  # the last step was taken
