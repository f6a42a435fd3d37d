"""The file of expert loads: written, resumed, cut short, damaged."""

from __future__ import annotations

import json

import pytest

from lightning_fastmoe.errors import DataError
from lightning_fastmoe.monitoring.logs import expert_load as load_log
from lightning_fastmoe.monitoring.logs.expert_load import Layer, LoadLogWriter, Record, Span

LAYERS = [Layer("a", 2), Layer("b", 3)]


def record(step, kept=None):
    return Record(step, [4, None], [[1, step], None], [kept, None], [0.5, None], [0.75, None])


def write(folder, steps, first_step=0, layers=LAYERS):
    writer = LoadLogWriter(folder, layers, first_step)
    for step in steps:
        writer.write(record(step))
    writer.close()
    return load_log.read(writer.path)


def steps(log):
    return [r.step for r in log.records]


def test_what_is_written_is_read(tmp_path):
    writer = LoadLogWriter(tmp_path / "new", LAYERS, 0)
    writer.write(record(4, kept=[1, 2]))
    log = load_log.read(writer.path)  # while it is still open
    assert log.layers == LAYERS
    assert log.records == [record(4, kept=[1, 2])]
    writer.close()


def test_resuming_replaces_what_went_on_past_the_checkpoint(tmp_path):
    write(tmp_path, [4, 9, 14, 19])
    log = write(tmp_path, [14, 19, 24], first_step=14)
    assert steps(log) == [4, 9, 14, 19, 24]
    assert steps(write(tmp_path, [4])) == [4]
    assert [p.name for p in tmp_path.iterdir()] == [load_log.FILE_NAME]


def test_a_line_cut_short_is_left_out(tmp_path):
    write(tmp_path, [4, 9])
    path = tmp_path / load_log.FILE_NAME
    path.write_text(path.read_text()[:-20])
    assert steps(load_log.read(path)) == [4]
    assert steps(write(tmp_path, [9], first_step=5)) == [4, 9]


def test_another_model_gets_a_new_file(tmp_path):
    write(tmp_path, [4])
    log = write(tmp_path, [9], first_step=5, layers=[*LAYERS[:1], Layer("c", 5)])
    assert steps(log) == [9]
    assert steps(load_log.read(tmp_path / "expert_load.1.jsonl")) == [4]
    write(tmp_path, [4])
    assert steps(load_log.read(tmp_path / "expert_load.2.jsonl")) == [9]


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (load_log.FORMAT, "other", "not a log of expert loads"),
        ('"version":1', '"version":2', "version 2"),
        ("[1,4]", "[1,4,4]", "line 2 is damaged"),
        ('"step":4', '"stop":4', "line 2 is damaged"),
        ('"step":9', '"step":4', "step 4 after step 4"),
    ],
)
def test_damage_is_named(tmp_path, old, new, message):
    write(tmp_path, [4, 9, 14])
    path = tmp_path / load_log.FILE_NAME
    replaced(path, old, new)
    with pytest.raises(DataError, match=message):
        load_log.read(path)
    # A run does not stop for that, nor delete it.
    assert steps(write(tmp_path, [1])) == [1]
    if "after" not in message:
        assert (tmp_path / "expert_load.1.jsonl").exists()


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / load_log.FILE_NAME
    path.touch()
    with pytest.raises(DataError, match="not a log"):
        load_log.read(path)


def test_lines_are_json(tmp_path):
    write(tmp_path, [4])
    lines = (tmp_path / load_log.FILE_NAME).read_text().splitlines()
    assert json.loads(lines[1])["routed"] == [[1, 4], None]


def test_spans_add_up():
    parts = [Span(i, i, [[i, 1], None if i < 2 else [i]]) for i in range(5)]
    merged = load_log.merged(parts, 2)
    assert merged == [Span(0, 2, [[3, 3], [2]]), Span(3, 4, [[7, 2], [7]])]
    assert load_log.merged(parts, 9) == parts
    assert load_log.merged([], 9) == []


def test_load_ratios_are_none_without_tokens():
    assert load_log.ratios([3, 1]) == [1.5, 0.5]
    assert load_log.ratios([0, 0]) is None
    assert load_log.ratios(None) is None
