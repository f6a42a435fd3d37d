"""Checkpoint hooks see names and shapes of all weights; what they edit is refused, never lost."""

from __future__ import annotations

import pytest
from strategy import hook_runs as runs
from strategy.models import D_FFN, D_MODEL, Case

CASE = Case(2, 2, 2)

CHANGES = {
    "add": "'mine' in checkpoint['state_dict'] was added",
    "remove": f"'{runs.HEAD}' in checkpoint['state_dict'] was removed",
    "leave_out": "'net.moes.0.experts.",
    "convert": "and ",
    "scale": f"'{runs.HEAD}' in checkpoint['state_dict'] was changed",
    "forget": "checkpoint['state_dict'] was removed",
    "on_rank_0": f"'{runs.HEAD}' in checkpoint['state_dict'] was removed",
    "change_optimizer": "checkpoint['optimizer_states'] was changed",
}


def test_edits_are_refused_on_all_ranks(rank_pool, tmp_path):
    for found in rank_pool.run(runs.edited, 2, CASE, str(tmp_path)):
        assert len(found) == 2 * len(CHANGES) + 1
        for name, change in CHANGES.items():
            for when in ("save", "load"):
                kind, message = found[f"{when} {name}"]
                assert kind == "CheckpointError", (when, name, message)
                assert f"Editing.on_{when}_checkpoint: " in message
                assert change in message
                assert "has no effect under FastMoEStrategy" in message
        assert "EditingCallback.on_save_checkpoint: " in found["callback"][1]


@pytest.mark.parametrize("stage", [1, 3])
def test_what_hooks_see(rank_pool, tmp_path, stage):
    for seen in rank_pool.run(runs.looked, 2, Case(2, 2, stage), str(tmp_path)):
        assert seen["saved"] == seen["loaded"]
        assert seen["saved"][runs.UP] == [4, D_FFN, D_MODEL]
        assert seen["saved"]["tied.weight"] == seen["saved"][runs.HEAD] == [1, D_MODEL]
        assert seen["saved"]["steps_seen"] == []


def test_a_strategy_without_a_module(rank_pool, tmp_path):
    (errors,) = rank_pool.run(runs.without_a_module, 1, Case(), str(tmp_path))
    methods = ["load", "save", "lightning_module_state_dict", "load", "save"]
    for (kind, message), method in zip(errors, methods, strict=True):
        assert kind == "ConfigError", message
        assert f"FastMoEStrategy.{method}" in message
        assert "ckpt_path" in message


def test_what_could_not_be_saved_is_refused_before_training(rank_pool, tmp_path):
    for found in rank_pool.run(runs.refused_at_set_up, 2, CASE, str(tmp_path)):
        kind, message = found["lookalike"]
        assert kind == "ConfigError", message
        assert "'net.mine' is not a MoE layer" in message
        assert "enable_checkpointing=False" in message
        for name, file in (("last", "last.ckpt"), ("name", "best.ckpt")):
            kind, message = found[name]
            assert kind == "CheckpointError", message
            assert f"{file} is a directory that is not a checkpoint" in message
            assert "thesis.txt" in message
    assert (tmp_path / "last.ckpt" / "thesis.txt").read_text() == "years of work"
