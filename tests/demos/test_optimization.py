"""The learning rate over a run. Which weights decay is in test_model.py, on a model's."""

from __future__ import annotations

import pytest

from lightning_fastmoe.demos.optimization import lr_ratio


def test_learning_rate_warms_up_then_falls_to_its_floor() -> None:
    ratios = [lr_ratio(step, 10, 110, 0.2) for step in range(111)]
    assert ratios[0] == pytest.approx(1 / 11)
    assert ratios[:11] == sorted(ratios[:11])
    assert ratios[10] == pytest.approx(1.0)
    assert ratios[60] == pytest.approx(0.6)
    assert ratios[10:] == sorted(ratios[10:], reverse=True)
    assert ratios[110] == pytest.approx(0.2)


def test_learning_rate_stays_at_its_peak_without_an_end() -> None:
    assert lr_ratio(10**6, 10, None, 0.2) == 1.0
