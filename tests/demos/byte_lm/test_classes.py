"""Which arguments make `fit` train other classes than the example's."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fastmoe.demos.byte_lm.classes import names_a_class


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("data: {class_path: a.B}\ntrainer: {max_steps: 1}")
    Path("values.yaml").write_text("model: {top_k: 2}\ntrainer: {logger: {class_path: a.B}}")
    Path("damaged.yaml").write_text("model: {")
    Path("list.yaml").write_text("- model")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--model=a.B"],
        ["fit", "--data", "a.B"],
        ["fit", "--model.class_path=a.B"],
        ["fit", "--config", "own.yaml"],
        ["fit", "-c", "own.yaml"],
        ["fit", "--config=values.yaml", "--config=own.yaml"],
    ],
)
def test_other_classes(folder: Path, words: list[str]) -> None:
    assert names_a_class(words)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fit", "--model.top_k=2", "--trainer.logger=a.B"],
        ["fit", "--config"],
        ["fit", "--config=nowhere.yaml"],
        ["fit", "--config=."],
        *(["fit", f"--config={name}.yaml"] for name in ("values", "damaged", "list")),
    ],
)
def test_the_example(folder: Path, words: list[str]) -> None:
    assert not names_a_class(words)
