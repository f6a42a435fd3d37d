"""Reading metrics.csv, TensorBoard's event files, and finding the run in a folder."""

from __future__ import annotations

import sys

import pytest
from monitoring.report import runs
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_fastmoe.errors import DataError
from lightning_fastmoe.monitoring.report.logs import matching, read_run


def test_lightnings_csv(tmp_path):
    logger = CSVLogger(tmp_path, name="x")
    logger.log_metrics({"train_loss": 2.0}, step=9)
    logger.log_metrics({"train_loss": float("nan"), "val_loss": 3.0}, step=19)
    logger.log_metrics({"train_loss": 1.0, "epoch": 0}, step=19)
    logger.save()
    run = read_run(tmp_path / "x")
    assert run.folder.name == "version_0"
    assert run.scalars == {"train_loss": [(9, 2.0), (19, 1.0)], "val_loss": [(19, 3.0)]}
    assert run.loads is None


def test_scalars_are_read_from_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="x")
    for step in (9, 19):
        logger.log_metrics({"train_loss": step / 2}, step=step)
    logger.finalize("success")
    assert read_run(tmp_path / "x").scalars["train_loss"] == [(9, 4.5), (19, 9.5)]


def test_tensorboard_that_is_not_installed_is_said(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1.host").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    run = read_run(tmp_path)
    assert run.scalars == {}
    assert "pip install tensorboard" in run.notes[0]


def test_the_latest_version_is_read(tmp_path):
    for number in (0, 2, 10):
        runs.write_csv(tmp_path / f"version_{number}")
    (tmp_path / "version_11").mkdir()
    run = read_run(tmp_path)
    assert run.folder.name == "version_10"
    assert "3 runs" in run.notes[0]
    assert read_run(tmp_path / "version_2").notes == []


def test_folders_without_logs(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_run(tmp_path / "no")
    with pytest.raises(DataError, match="has no logs"):
        read_run(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="is a file"):
        read_run(file)
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column 'step'"):
        read_run(tmp_path)


def test_names_with_lightnings_endings():
    scalars = {"loss_epoch": [(1, 1.0)], "loss_step": [(0, 2.0)], "val_loss_epoch": [(1, 3.0)]}
    found = matching(scalars, ["loss", "val_loss", "other"])
    assert found == {"loss": [(0, 2.0)], "val_loss": [(1, 3.0)]}
