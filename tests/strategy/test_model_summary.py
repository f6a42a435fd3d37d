"""Lightning's table of parameters, and what it leaves out under expert parallelism."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from pytorch_lightning.callbacks import ModelSummary, RichModelSummary, Timer
from torch import nn

from lightning_fastmoe import MoE
from lightning_fastmoe.nn.placement import Placement, expert_placement
from lightning_fastmoe.strategy.model_summary import correct_summary


def layer(local: int, **arguments) -> MoE:
    """One of 8 experts, ``local`` of them here."""
    with expert_placement(lambda num_experts: Placement(tuple(range(local)))):
        return MoE(d_model=4, d_ffn=6, num_experts=8, **arguments)


def said(
    caplog: pytest.LogCaptureFixture, callbacks, training: bool = True, **layers: MoE
) -> list[str]:
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        trainer = SimpleNamespace(callbacks=callbacks, training=training)
        correct_summary(trainer, nn.ModuleDict(layers))
    finally:
        logger.removeHandler(caplog.handler)
    return list(dict.fromkeys(record.getMessage() for record in caplog.records))


@pytest.mark.parametrize("summary", [ModelSummary(), RichModelSummary()])
def test_experts_of_other_ranks(caplog: pytest.LogCaptureFixture, summary) -> None:
    (text,) = said(caplog, [Timer(), summary], first=layer(2), second=layer(4), last=layer(8))
    whole = MoE(d_model=4, d_ffn=6, num_experts=8)
    one = sum(p.numel() for p in whole.experts.parameters()) // 8
    assert text.startswith(
        "The summary above counts the experts of one rank only, such as 2 of 8 in first."
        f" The other ranks hold {6 * one + 4 * one:,} more parameters. "
    )
    assert "MoESummary" in text


def test_experts_that_may_differ_are_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    (text,) = said(caplog, [ModelSummary()], first=layer(2, expert=lambda d, f: nn.Linear(d, d)))
    assert "2 of 8 in first. Add" in text


def test_nothing_to_correct(caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, [ModelSummary()], first=layer(8)) == []
    assert said(caplog, [ModelSummary(max_depth=0)], first=layer(2)) == []
    assert said(caplog, [], first=layer(2)) == []
    assert said(caplog, [ModelSummary()], training=False, first=layer(2)) == []
