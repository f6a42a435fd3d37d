"""``lightning-fastmoe report``: where the page goes, what is printed, and errors of one line."""

from __future__ import annotations

import json

import pytest
from monitoring.report import runs

from lightning_fastmoe import cli


def test_prints_the_verdict_and_the_path(tmp_path, capsys):
    runs.make_run(tmp_path / "version_0")
    assert cli.main(["report", str(tmp_path)]) == 0
    page = tmp_path / "version_0" / "report.html"
    assert capsys.readouterr().out.splitlines() == [
        "2 of 32 experts are starving (1 dead): layer 2 expert 5, layer 0 expert 3.",
        str(page),
    ]
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_json_lists_the_starving_experts(tmp_path, capsys):
    runs.make_run(tmp_path)
    output = tmp_path / "x.html"
    assert cli.main(["report", str(tmp_path), "--json", "--output", str(output)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert output.exists()
    assert found["page"] == str(output)
    assert found["state"] == "starving"
    assert [(x["layer"], x["expert"], x["dead"]) for x in found["starving"]] == [
        (2, 5, True),
        (0, 3, False),
    ]
    assert found["starving"][1]["load_ratio"] == pytest.approx(12 * 8 / sum(runs.counts(0, 399)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "has no logs"),
        ([".", "--starving", "0"], "--starving 0.0 is out of range"),
        ([], "required: RUN_DIR"),
        (["run", "--output", "no/x.html"], "no/x.html can't be written"),
    ],
)
def test_errors_are_one_line(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.make_run(tmp_path / "run")
    try:
        status = cli.main(["report", *words])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err
