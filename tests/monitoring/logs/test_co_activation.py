"""The file of co-activations: what is written is read, and damage is an error of one line."""

from __future__ import annotations

import json

import pytest

from lightning_fastmoe.errors import DataError
from lightning_fastmoe.monitoring.logs import co_activation as log

FOUND = log.CoActivationLog(
    10, 19, [log.LayerCoActivation("a", [[4, 1], [1, 2]]), log.LayerCoActivation("b", [[7]])]
)


def test_round_trip(tmp_path):
    path = log.write(tmp_path / "new", FOUND)
    assert path == tmp_path / "new" / log.FILE_NAME
    assert log.read(path) == FOUND
    later = log.CoActivationLog(20, 29, FOUND.layers[:1])
    log.write(tmp_path / "new", later)
    assert log.read(path) == later
    assert [file.name for file in path.parent.iterdir()] == [log.FILE_NAME]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(version=2), "format version 2"),
        (lambda x: x.update(format="other"), "unknown format"),
        (lambda x: x.pop("layers"), "layers"),
        (lambda x: x["layers"][0]["together"].pop(), "a does not have 2 x 2 counts"),
        (lambda x: x["layers"][0]["together"][1].append(3), "a does not have 2 x 2 counts"),
        (lambda x: x["layers"][1].update(together=[["?"]]), "invalid literal"),
    ],
)
def test_a_damaged_file_is_refused_with_its_reason(tmp_path, change, message):
    path = log.write(tmp_path, FOUND)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        log.read(path)


@pytest.mark.parametrize("text", ["", "[]", '{"format"', "null"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / log.FILE_NAME
    path.write_text(text)
    with pytest.raises(DataError, match="is not a valid co-activation file"):
        log.read(path)


def test_shares_are_relative_to_the_rows_expert():
    together = [[4, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert log.shares(together) == [[None, 0.25, 0], [0.5, None, 0], [None, None, None]]
