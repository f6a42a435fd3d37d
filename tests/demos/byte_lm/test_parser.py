"""Wrong options and keys of the training commands: one line, and what was probably meant."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_fastmoe import cli
from lightning_fastmoe.demos.byte_lm import cli as lm_cli

TINY = str(Path(__file__).parents[3] / "examples" / "tiny_lm.yaml")
STRATEGY = "trainer.strategy: lightning_fastmoe.FastMoEStrategy: "
MONITOR = """
trainer:
  callbacks:
  - class_path: lightning_fastmoe.ExpertLoadMonitor
    init_args: {every: 3}
"""


def _error(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a command says before it gives up; it must not have come to building a model."""
    monkeypatch.setattr(sys, "argv", ["lightning-fastmoe"])
    monkeypatch.setattr(lm_cli.FastMoECLI, "instantiate_classes", lambda self: pytest.fail("ran"))
    try:
        status = cli.main(words)
    except SystemExit as stopped:  # argparse's way
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        # Short of what it means, which argparse would take for it.
        ("--model.num_expert=16", "unrecognized arguments: --model.num_expert=16. Did you mean"),
        ("--trainer.max_step=5", "Did you mean trainer.max_steps?"),
        ("--data.bach_size=5", "Did you mean data.batch_size?"),
        ("--zzz=1", "unrecognized arguments: --zzz=1 (see lightning-fastmoe fit --help)"),
        ("--model.num_experts=many", "model.num_experts: expected int. Got value: many"),
        (
            "--trainer.strategy.init_args.expert_parallel=2",
            f"{STRATEGY}Option 'expert_parallel' is not accepted. Did you mean expert_parallel_",
        ),
        (
            "--trainer.strategy.init_args.stage=two",
            f"{STRATEGY}stage: expected int. Got value: two",
        ),
    ],
)
def test_on_the_command_line(
    option: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in _error(["fit", "--config", TINY, option], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {num_expert: 3}", "'model.num_expert'. Did you mean model.num_experts?"),
        ("modle: {num_experts: 3}", "'modle.num_experts'. Did you mean model.num_experts?"),
        (MONITOR, "ExpertLoadMonitor: Option 'every' is not accepted. Did you mean every_n_steps?"),
        (
            "trainer: {strategy: {class_path: lightning_fastmoe.FastMoEStrateg}}",
            "module 'lightning_fastmoe' has no attribute 'FastMoEStrateg'",
        ),
        ("model: [1", "line 1, column 8"),
    ],
)
def test_in_a_file(
    text: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert expected in _error(["fit", "--config", str(file)], monkeypatch, capsys)


def test_a_file_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _error(["fit", "--config", "nowhere.yaml"], monkeypatch, capsys)
    assert error.startswith("config: File does not exist: ")


@pytest.mark.parametrize("words", [["fit"], ["fit", "--data.path=README.md"]])
def test_fit_asks_for_a_configuration(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _error(words, monkeypatch, capsys)
    assert "lightning-fastmoe fit --config examples/tiny_lm.yaml" in error
