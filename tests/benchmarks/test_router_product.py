"""Rows of both dtypes with errors of fp32, in files and on screen; unknown sizes are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import router_product
import torch

from lightning_fastmoe import ops


def test_measures_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / name for name in ("json", "markdown")}
    wanted = ["--configs", "sonic-7b,olmoe-1b-7b", "--tiny", "--device", "cpu", "--repeats", "2"]
    wanted += [text for name, path in files.items() for text in (f"--{name}", str(path))]
    assert router_product.main(wanted) == 0
    results = json.loads(files["json"].read_text())["results"]
    assert len(results) == 4
    for row, found in results.items():
        assert len(found) == 6
        for of, one in found.items():
            assert one["us"] > 0
            rounded = "tokens" in of or ("weight" in of and "in bf16" in row)
            assert one["error"] < (3e-3 if rounded else 1e-6), (row, of)
    text = files["markdown"].read_text()
    assert text.count("\n") == 6
    assert text in capsys.readouterr().out


def test_a_wrong_product_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "router_logits", lambda x, weight: x.float() @ weight.float().T * 1.01)
    config = router_product.parse_configs("sonic-7b")[0].tiny()
    found = router_product.measure(config, torch.float32, torch.device("cpu"), 1)
    assert found["ours logits"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert found["fp32 logits"]["error"] < 1e-6


def test_unknown_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert router_product.main(["--configs", "nothing"]) == 2
    assert "'nothing': nothing is not a configuration" in capsys.readouterr().err
