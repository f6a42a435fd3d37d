"""transformers' models in place with the bits of one process."""

from __future__ import annotations

import pytest
from huggingface import exact_runs as runs
from huggingface.sharding_runs import Run, assert_same, reference
from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import choose_dispatcher

NAMES = ["dedup", "symmetric"]


@pytest.mark.parametrize("dispatcher", NAMES)
@pytest.mark.parametrize("name", runs.CLASSES)
def test_outputs_and_gradients_of_tokens_have_the_bits_of_one_process(
    name: str, dispatcher: str, rank_pool
) -> None:
    for unequal in rank_pool.run(runs.unequal, 2, name, dispatcher, True):
        assert unequal == []
    for unequal in rank_pool.run(runs.unequal, 2, name, dispatcher, False):
        assert {"output", "x"} <= {*unequal}, "what the above would find"


@pytest.mark.parametrize("dispatcher", NAMES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_fine_tuning_equals_one_process(name: str, dispatcher: str, rank_pool) -> None:
    run = Run(name, extra={"exact": True})
    expected = reference(run)
    for trace, exact in rank_pool.run(runs.train, 2, dispatcher, run):
        assert exact == 2
        assert_same(trace, expected)


def test_not_by_every_dispatcher() -> None:
    with pytest.raises(ConfigError, match="exact=True is not possible with dispatcher='all_to_all"):
        choose_dispatcher(nn.Linear(2, 2), "all_to_all", exact=True)
