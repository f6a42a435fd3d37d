"""What a user's own program prints under the strategy: nothing that nobody can act on."""

from __future__ import annotations

import warnings

from strategy.quiet_runs import printed

from lightning_fastmoe.strategy.quiet import quiet_warnings

NOISE = (
    "Tip:",
    "initializing deepspeed",
    "Enabling DeepSpeed",
    "untested optimizer",
    "weights_only",
    "DistributedSampler",
    "reduce_scatter_tensor",
    "utilities/_pytree.py",
)


def test_a_program_of_two_ranks(rank_pool, tmp_path) -> None:
    for text in rank_pool.run(printed, 2, str(tmp_path)):
        assert [line for line in text.splitlines() if any(noise in line for noise in NOISE)] == []
        # The user's own: one about the same thing, and one call of an old collective.
        assert text.count("UserWarning: `isinstance(treespec, LeafSpec)` is deprecated") == 1
        assert text.count("`torch.distributed.all_gather_into_tensor` is deprecated") == 1


def test_filters_are_those_from_before_when_a_run_is_over() -> None:
    before = list(warnings.filters)
    undo = quiet_warnings()
    assert len(warnings.filters) == len(before) + 2
    undo()
    undo()
    assert list(warnings.filters) == before
