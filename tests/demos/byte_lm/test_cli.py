"""Training from the command line: configuration files, automatic values, errors as one line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import BasePredictionWriter, ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel

from lightning_fastmoe import cli
from lightning_fastmoe.cli.table import TRACEBACK_VARIABLE
from lightning_fastmoe.demos.byte_lm import cli as lm_cli
from lightning_fastmoe.errors import DataError, FastMoEError

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(autouse=True)
def _restore_logging_and_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        yield
    for name in lm_cli._CHATTERING_LOGGERS:
        logging.getLogger(name).removeFilter(lm_cli._is_about_the_run)


def _printed_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict:
    monkeypatch.setattr(sys, "argv", ["lightning-fastmoe"])
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["tiny_lm", "gpu_lm"])
def test_examples_parse(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = EXAMPLES / f"{name}.yaml"
    written = yaml.safe_load(file.read_text())
    config = _printed_config(monkeypatch, capsys, "fit", "--config", str(file))
    assert config["trainer"]["strategy"]["class_path"] == "lightning_fastmoe.FastMoEStrategy"
    for section in ("auto", "model", "data"):
        assert written[section].items() <= config[section].items()


def test_pretraining_example_parses_with_small_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = EXAMPLES / "pretrain_lm.yaml"
    written = yaml.safe_load(file.read_text())
    config = _printed_config(
        monkeypatch, capsys, "fit", f"--config={file}", "--model.d_model=32", "--data.path=data/x"
    )
    for section, name, value in (("model", "d_model", 32), ("data", "path", "data/x")):
        assert config[section]["class_path"] == written[section]["class_path"]
        expected = {**written[section]["init_args"], name: value}
        assert expected.items() <= config[section]["init_args"].items()


def test_errors_of_named_classes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fastmoe"])
    words = [f"--config={EXAMPLES / 'pretrain_lm.yaml'}", f"--data.path={tmp_path / 'nowhere'}"]
    assert cli.main(["fit", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: '{tmp_path / 'nowhere'}' is not a folder.")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.strategy=fastmo"], "there is no 'fastmo'. Did you mean fastmoe?"),
        (["--trainer.strategy=a.FastMoE"], "there is no 'a.FastMoE'. This package's are fastmoe,"),
        (["--trainer.devices=0"], "Trainer(devices='0')"),
        (["--trainer.accelerator=gpu"], "No supported gpu backend found"),
        (["--trainer.max_steps=-5"], "`max_steps` must be a non-negative integer"),
        (["--ckpt_path=best"], "`ModelCheckpoint` is not configured to save the best model"),
        (["--trainer.precision=64-true"], "precision='64-true')` is not supported"),
        (["--trainer.default_root_dir=text", "--trainer.logger=true"], "Not a directory: '"),
    ],
    ids=lambda case: "" if isinstance(case, str) else case[0],
)
def test_what_lightning_refuses_is_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-fastmoe"])
    if "gpu" in words[0]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "text").write_text("abc" * 1000)
    given = [f"--config={EXAMPLES / 'tiny_lm.yaml'}", f"--data.path={tmp_path / 'text'}"]
    given.append("--trainer.devices=1")  # what is refused later must not start another pytest
    assert cli.main(["fit", *given, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_wrong_value_of_the_strategy_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fastmoe"])
    words = [f"--config={EXAMPLES / 'tiny_lm.yaml'}", "--trainer.strategy.stage=7"]
    assert cli.main(["fit", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: stage=7 is not supported: the ZeRO stage must be")
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("path", "weights", "warned"), [(None, None, 1), ("last", None, 0), (None, "a.ckpt", 0)]
)
def test_untrained_weights_are_mentioned(
    verb: str, path: str | None, weights: str | None, warned: int
) -> None:
    cli = SimpleNamespace(
        subcommand=verb,
        config={verb: SimpleNamespace(ckpt_path=path)},
        model=SimpleNamespace(_weights=weights),
        trainer=SimpleNamespace(callbacks=[]),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(lm_cli.FastMoECLI, f"before_{verb}")(cli)
    said = [str(one.message).startswith(f"{verb} without --ckpt_path") for one in caught]
    assert sum(said) == warned


class Writer(BasePredictionWriter):
    """Writes what is predicted."""


@pytest.mark.parametrize(("callbacks", "warned"), [([], 1), ([Writer("batch")], 0)])
def test_predictions_that_nothing_keeps_are_mentioned(callbacks: list[Any], warned: int) -> None:
    cli = SimpleNamespace(
        subcommand="predict",
        config={"predict": SimpleNamespace(ckpt_path="last")},
        trainer=SimpleNamespace(callbacks=callbacks),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm_cli.FastMoECLI.before_predict(cli)  # type: ignore[arg-type]
    assert ["BasePredictionWriter" in str(one.message) for one in caught] == [True] * warned


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"save_last": True, "save_top_k": 0, "every_n_train_steps": 1}, "last.ckpt"),
        ({"every_n_train_steps": 1, "filename": "at-{step}"}, "at-step=2.ckpt"),
        ({"save_top_k": 0}, None),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_the_end_of_training_says_where_checkpoints_are(
    inside: bool,
    kept: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if inside:
        monkeypatch.chdir(tmp_path)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(tmp_path / "kept", **kept)],
    )
    trainer.fit(BoringModel())
    capsys.readouterr()
    lm_cli.FastMoECLI.after_fit(SimpleNamespace(trainer=trainer))  # type: ignore[arg-type]
    where = "kept" if inside else tmp_path / "kept"
    assert capsys.readouterr().out == (f"Checkpoint: {where}/{said}\n" if said else "")


def test_errors_in_the_model_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a class that Lightning uses for what it refuses."""
    monkeypatch.setattr(sys, "argv", ["lightning-fastmoe"])
    monkeypatch.setattr(lm_cli, "resolve_auto", lambda *_: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["fit", f"--config={EXAMPLES / 'tiny_lm.yaml'}"])


def test_own_errors_are_found_behind_others() -> None:
    own, parsers = DataError("own"), ValueError("does not validate")
    parsers.__cause__ = TypeError()
    assert lm_cli.own_error(parsers) is None
    parsers.__cause__.__context__ = own
    assert lm_cli.own_error(parsers) is own
    assert lm_cli.own_error(own) is own
    listed = ValueError("Errors:\n  - Expected a <class 'str'>\n  - stage=7\nGiven value: x")
    assert str(lm_cli.own_error(listed)) == "stage=7"


def test_values_can_be_overridden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _printed_config(
        monkeypatch,
        capsys,
        "fit",
        f"--config={EXAMPLES / 'tiny_lm.yaml'}",
        "--data.path=README.md",
        "--model.num_experts=16",
        "--trainer.strategy.stage=1",
    )
    assert config["data"]["path"] == "README.md"
    assert config["model"]["num_experts"] == 16
    assert config["trainer"]["strategy"]["init_args"]["stage"] == 1


def _trainer(**values: object) -> SimpleNamespace:
    defaults = {"accelerator": "auto", "devices": "auto", "precision": None}
    return SimpleNamespace(**{**defaults, **values})


AUTO = lm_cli.AutoSettings(cpu_devices=2, gpu_precision="bf16-mixed")


def test_auto_without_a_gpu() -> None:
    trainer = _trainer()
    lm_cli.resolve_auto(trainer, AUTO, has_cuda=False)
    assert trainer == _trainer(accelerator="cpu", devices=2)


def test_auto_with_a_gpu() -> None:
    trainer = _trainer()
    lm_cli.resolve_auto(trainer, AUTO, has_cuda=True)
    assert trainer == _trainer(accelerator="cuda", precision="bf16-mixed")


@pytest.mark.parametrize("has_cuda", [False, True])
def test_what_the_user_gives_stands(has_cuda: bool) -> None:
    given = {"accelerator": "cpu", "devices": 1, "precision": "64-true"}
    trainer = _trainer(**given)
    lm_cli.resolve_auto(trainer, AUTO, has_cuda)
    assert trainer == _trainer(**given)


def _fit(path: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_fastmoe.cli", "fit"]
    command += [f"--config={EXAMPLES / 'tiny_lm.yaml'}", f"--data.path={path}"]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_missing_path_is_one_line_of_error(tmp_path: Path) -> None:
    result = _fit(tmp_path / "nowhere", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: data.path")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_traceback_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fastmoe"])
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(FastMoEError, match="nowhere"):
        cli.main(["fit", "--trainer.max_steps=1", f"--data.path={tmp_path / 'nowhere'}"])


def test_missing_jsonargparse_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert cli.main(["fit", "--config=examples/tiny_lm.yaml"]) == 2
    assert "pip install 'lightning-fastmoe[cli]'" in capsys.readouterr().err


def test_chatter_is_dropped_and_news_is_not(caplog: pytest.LogCaptureFixture) -> None:
    lm_cli.silence_upstream()
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        logger.warning("GPU available: False, used: False")
        logger.warning("`Trainer.fit` stopped: `max_steps=5` reached.")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage()[:13] for record in caplog.records} == {"`Trainer.fit`"}


@pytest.mark.parametrize(("module", "shown"), [("torch.distributed", 0), ("my_model", 1)])
def test_only_deprecations_inside_libraries_are_hidden(module: str, shown: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm_cli.silence_upstream()
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)
    assert len(caught) == shown


def test_routers_and_layers_are_chosen_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "routers.yaml"
    file.write_text(
        "model:\n  router: nn.router.test_common.Nearest\n  top_k: null\n"
        "  moe:\n    capacity_factor: [1.0, 2.0]\n    drop_by: score\n"
        "trainer:\n  callbacks:\n  - class_path: lightning_fastmoe.RouterBiasBalancing\n"
        "    init_args: {rate: 0.01}\n"
    )
    config = _printed_config(
        monkeypatch, capsys, "fit", f"--config={EXAMPLES / 'tiny_lm.yaml'}", f"--config={file}"
    )
    assert config["model"]["router"] == "nn.router.test_common.Nearest"
    assert config["model"]["top_k"] is None
    assert config["model"]["moe"] == {"capacity_factor": [1.0, 2.0], "drop_by": "score"}
    from lightning_fastmoe.demos.byte_lm import MoELanguageModel

    model = MoELanguageModel(**config["model"])
    model.configure_model()
    layer = model.network.blocks[0].moe
    assert type(layer.router).__name__ == "Nearest"
    assert (layer.capacity_factor, layer.eval_capacity_factor) == (1.0, 2.0)
