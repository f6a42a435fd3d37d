"""benchmarks/exchange_loopback.py refuses wrong results."""

from __future__ import annotations

import exchange_loopback
import pytest
import torch

from lightning_fastmoe.distributed.schedule.symmetric import SymmetricSchedule
from lightning_fastmoe.testing import RankPool


def run(spoil: bool) -> int:
    before = exchange_loopback.Case.results

    def spoilt(self: exchange_loopback.Case) -> list[torch.Tensor]:
        values = before(self)
        if isinstance(self.layer.schedule, SymmetricSchedule):
            values[1][0] += 1.0
        return values

    with pytest.MonkeyPatch.context() as patch:
        if spoil:
            patch.setattr(exchange_loopback.Case, "results", spoilt)
        arguments = ["--device", "cpu", "--tiny", "--configs", "sonic-7b"]
        return exchange_loopback.main([*arguments, "--rounds", "1", "--steps", "1"])


@pytest.mark.parametrize("spoil", [False, True])
def test_times_what_is_right(rank_pool: RankPool, spoil: bool) -> None:
    assert rank_pool.run(run, 1, spoil) == [int(spoil)]
