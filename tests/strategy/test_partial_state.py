"""state_dict() of a model warns where this rank has only some of its experts."""

from __future__ import annotations

from strategy import partial_state_runs as runs
from strategy.models import Case


def test_of_a_module_after_a_run(rank_pool, tmp_path):
    found = rank_pool.run(runs.of_a_run, 2, Case(2, 2, 2, 1), str(tmp_path))
    for ids, said in zip(("0..1", "2..3"), found, strict=True):
        assert said["saving"] == said["head"] == []
        assert f"has experts {ids} of 4 of net.moes.0, those of this rank" in said["module"][0]
        assert "Trainer.save_checkpoint()" in said["module"][0]
        assert len(said["module"]) == 2  # layers
        assert len(said["a part"]) == 1


def test_not_where_all_experts_are_here(rank_pool, tmp_path):
    for said in rank_pool.run(runs.of_a_run, 2, Case(2, 1, 2, 1), str(tmp_path)):
        assert not any(said.values())


def test_of_a_plain_loop(rank_pool):
    for said in rank_pool.run(runs.of_a_plain_loop, 2):
        assert said["full"] == said["optimizer"] == []
        assert "full_state_dict()" in said["model"][0]
