"""benchmarks/exchange_loopback.py plays all ranks, and refuses wrong results."""

from __future__ import annotations

import exchange_loopback
import pytest
import torch

from lightning_fastmoe.testing import RankPool


def run(spoil: bool, ranks: str) -> int:
    before = exchange_loopback.Case.results

    def spoilt(self: exchange_loopback.Case) -> list[torch.Tensor]:
        values = before(self)
        if self.layer.is_sharded:
            values[1][0] += 1.0
        return values

    with pytest.MonkeyPatch.context() as patch:
        if spoil:
            patch.setattr(exchange_loopback.Case, "results", spoilt)
        arguments = ["--device", "cpu", "--tiny", "--configs", "sonic-7b", "--ranks", ranks]
        return exchange_loopback.main([*arguments, "--rounds", "1", "--steps", "1"])


@pytest.mark.parametrize(("spoil", "ranks"), [(False, "2"), (True, "2"), (False, "4")])
def test_times_what_is_right(rank_pool: RankPool, spoil: bool, ranks: str) -> None:
    assert rank_pool.run(run, 1, spoil, ranks) == [int(spoil)]
