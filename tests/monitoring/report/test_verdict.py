"""Which experts starve, by numbers worked out by hand."""

from __future__ import annotations

import pytest

from lightning_fastmoe.monitoring.logs.expert_load import Layer, LoadLog, Record
from lightning_fastmoe.monitoring.report.verdict import judge


def log(*lines):
    """Each line: the counts of each layer."""
    layers = [Layer(f"l{i}", 4) for i in range(len(lines[0]))]
    n = len(layers)
    records = [
        Record(10 * i, [1] * n, list(rows), [None] * n, [1.0] * n, [1.0] * n)
        for i, rows in enumerate(lines)
    ]
    return LoadLog(layers, records)


EVEN = [100, 100, 100, 100]


def test_starving_and_dead_worst_first():
    found = judge(log([EVEN, [130, 10, 130, 130]], [[396, 4, 0, 0], [120, 20, 130, 130]]))
    # The last line alone is judged; 20 / 100 and 4 / 100 are below a quarter.
    assert [(str(x), x.ratio, x.dead) for x in found.starving] == [
        ("layer 0 expert 2", 0.0, True),
        ("layer 0 expert 3", 0.0, True),
        ("layer 0 expert 1", 0.04, False),
        ("layer 1 expert 1", 0.2, False),
    ]
    assert found.sentence == (
        "4 of 8 experts are starving (2 dead): layer 0 expert 2, layer 0 expert 3,"
        " layer 0 expert 1, ..."
    )
    assert found.state == "starving"


def test_a_single_starving_expert_is_named_in_the_singular():
    found = judge(log([[134, 0, 133, 133]]))
    assert found.sentence == "1 of 4 experts is starving (1 dead): layer 0 expert 1."


def test_alive_names_the_smallest():
    found = judge(log([EVEN, [110, 70, 110, 110]]))
    assert found.state == "alive"
    assert found.sentence == (
        "All 8 experts are alive: the smallest load is 0.70 of the mean (layer 1 expert 1)."
    )


@pytest.mark.parametrize(("threshold", "number"), [(0.2, 0), (0.21, 1), (1.0, 1)])
def test_starving_is_strictly_below_the_threshold(threshold, number):
    assert len(judge(log([[120, 20, 130, 130]]), threshold).starving) == number


def test_the_last_tenth_is_summed():
    lines = [[[0, 400, 0, 0]]] * 18 + [[[400, 0, 0, 0]], [[0, 200, 100, 100]]]
    found = judge(log(*lines))
    assert found.recent.routed == [[400, 200, 100, 100]]
    assert (found.recent.first_step, found.recent.last_step) == (180, 190)
    assert found.state == "alive"


def test_few_tokens_and_none():
    found = judge(log([[1, 0, 3, 2], None]))
    assert found.num_experts == 4
    assert [note[:7] for note in found.notes] == ["Layer 0", "Layer 1"]
    assert "are noisy" in found.notes[0]


@pytest.mark.parametrize("empty", [None, LoadLog([Layer("a", 2)])])
def test_nothing_to_judge(empty):
    found = judge(empty)
    assert found.state == "unknown"
    assert found.sentence.startswith("Whether experts are starving is unknown")
    assert judge(log([None])).state == "unknown"
