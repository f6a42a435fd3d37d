"""What ExpertLoadMonitor leaves in the run's folder: the log of loads, and figures."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from callbacks.model import BATCH, TOKENS, Model, SaveAt, make_trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_fastmoe import ExpertLoadMonitor
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.monitoring.callbacks import load_figures
from lightning_fastmoe.monitoring.logs import expert_load as load_log


def watch(model):
    """Notes the counts of every pass of training, per layer."""
    seen = {"first": [], "second": []}
    for name, notes in seen.items():
        layer = getattr(model, name)

        def note(layer, routing, notes=notes):
            ids = routing.expert_ids.flatten()
            if layer.training:
                notes.append(torch.bincount(ids, minlength=layer.num_experts))

        layer.register_routing_observer(note)
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_log_holds_what_was_routed(tmp_path, accumulate):
    model = Model(steps=8)
    seen = watch(model)
    logger = CSVLogger(tmp_path, name="x")
    # Passes of validation, which do not count, come in between.
    options = {"limit_val_batches": 2, "val_check_interval": 2 * accumulate, "logger": logger}
    options["accumulate_grad_batches"] = accumulate
    make_trainer(tmp_path, ExpertLoadMonitor(), **options).fit(model)
    log = load_log.read(tmp_path / "x" / "version_0" / load_log.FILE_NAME)
    assert log.layers == [load_log.Layer("first", 4), load_log.Layer("second", 6)]
    window = 2 * accumulate  # passes between two lines
    assert [r.step for r in log.records] == [2 * i + 1 for i in range(8 // window)]
    for i, record in enumerate(log.records):
        for at, notes in enumerate(seen.values()):
            want = sum(notes[i * window : (i + 1) * window])
            assert record.routed[at] == want.tolist()
        assert record.tokens == [window * BATCH * TOKENS] * 2
        assert record.kept == [None, None]
        assert all(0 < x < 2 for x in record.entropy)
    # The loggers keep the same step under the same number.
    logged = (tmp_path / "x" / "version_0" / "metrics.csv").read_text().splitlines()
    column = logged[0].split(",").index("step")
    assert [int(row.split(",")[column]) for row in logged[1:]] == [r.step for r in log.records]


def test_dropped_pairs_are_in_the_log(tmp_path):
    model = Model(capacity_factor=0.5)
    make_trainer(tmp_path, ExpertLoadMonitor(folder=str(tmp_path))).fit(model)
    log = load_log.read(tmp_path / load_log.FILE_NAME)
    room = 2 * 3  # two passes, ceil(0.5 * 2 * 12 / 4) = 3 places
    for record in log.records:
        assert sum(record.kept[0]) < sum(record.routed[0]) == 2 * 2 * BATCH * TOKENS
        assert max(record.kept[0]) <= room
        assert record.kept[1] is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_goes_on_in_the_file(tmp_path, accumulate):
    once = tmp_path / "once"
    options = {"accumulate_grad_batches": accumulate}
    make_trainer(tmp_path, ExpertLoadMonitor(folder=str(once)), **options).fit(
        Model(steps=8 * accumulate)
    )
    again = str(tmp_path / "again")
    save = SaveAt(4, tmp_path / "four.ckpt")
    # It goes on to step 6, and stops; then it resumes from step 4.
    make_trainer(tmp_path, ExpertLoadMonitor(folder=again), save, max_steps=6, **options).fit(
        Model(steps=8 * accumulate)
    )
    before = load_log.read(tmp_path / "again" / load_log.FILE_NAME)
    assert [r.step for r in before.records] == [1, 3, 5]
    make_trainer(tmp_path, ExpertLoadMonitor(folder=again), **options).fit(
        Model(steps=8 * accumulate), ckpt_path=tmp_path / "four.ckpt"
    )
    found = load_log.read(tmp_path / "again" / load_log.FILE_NAME)
    assert [r.step for r in found.records] == [1, 3, 5, 7]
    # Lightning starts the data anew within an epoch, so what follows is of other batches.
    assert found.records[:2] == load_log.read(once / load_log.FILE_NAME).records[:2]


def test_without_a_logger_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, ExpertLoadMonitor(figures_every_n_steps=2)).fit(Model())
    assert list(tmp_path.iterdir()) == []


def test_figures_as_files(tmp_path):
    monitor = ExpertLoadMonitor(figures_every_n_steps=4)
    make_trainer(tmp_path, monitor, logger=CSVLogger(tmp_path, name="x")).fit(Model())
    folder = tmp_path / "x" / "version_0" / "moe" / "expert_load"
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000003.png", "step_00000007.png"]


def test_figures_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="x")
    make_trainer(tmp_path, ExpertLoadMonitor(figures_every_n_steps=4), logger=logger).fit(Model())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [e.step for e in events.Images("moe/expert_load")] == [3, 7]
    assert not (tmp_path / "x" / "version_0" / "moe").exists()


class LikeWandb(CSVLogger):
    """Takes images as WandbLogger does."""

    def log_image(self, key, images, step=None):
        self.images = [*getattr(self, "images", []), (key, step, type(images[0]).__name__)]


def test_figures_in_wandb(tmp_path):
    logger = LikeWandb(tmp_path, name="x")
    make_trainer(tmp_path, ExpertLoadMonitor(figures_every_n_steps=8), logger=logger).fit(Model())
    assert logger.images == [("moe/expert_load", 7, "Figure")]
    # The real one can be called so, too.
    inspect.signature(WandbLogger.log_image).bind(None, key="a", images=[], step=7)


def test_figures_in_a_wandb_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not among the packages for tests")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="x", save_dir=tmp_path, offline=True)
    make_trainer(tmp_path, ExpertLoadMonitor(figures_every_n_steps=8), logger=logger).fit(Model())
    logger.experiment.finish()
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/moe/expert_load_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_figures_colours_are_the_loads():
    layers = [load_log.Layer("a", 2), load_log.Layer("b", 4)]
    columns = [load_log.Span(i, i, [[1, 3], [4, 0, 2, 2] if i else None]) for i in range(3)]
    figure = load_figures.draw_loads(layers, columns[-1], columns)
    now, over_time = (axes.get_images()[0].get_array() for axes in figure.axes[:2])
    colour = load_figures.colour
    white = (255, 255, 255)
    assert [tuple(x) for x in now[0]] == [colour(0.5), colour(1.5), white, white]
    assert [tuple(x) for x in now[1]] == [colour(2), colour(0), colour(1), colour(1)]
    assert over_time.shape[:2] == (6, 3)
    assert [tuple(x) for x in over_time[3]] == [colour(None), colour(0), colour(0)]


def test_history_is_bounded_and_loses_no_token():
    history = load_figures.LoadHistory()
    for i in range(5000):
        history.add(load_log.Span(i, i, [[1, 2]]))
    columns = history.columns()
    assert len(history._spans) <= 8 * load_figures.COLUMNS
    assert len(columns) <= load_figures.COLUMNS
    assert sum(c.routed[0][1] for c in columns) == 10_000
    assert (columns[0].first_step, columns[-1].last_step) == (0, 4999)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(load_figures, "find_spec", lambda name: None)
    ExpertLoadMonitor()
    with pytest.raises(ConfigError, match=r"pip install 'lightning-fastmoe\[plots\]'"):
        ExpertLoadMonitor(figures_every_n_steps=10)


@pytest.mark.parametrize("name", ["every_n_steps", "figures_every_n_steps"])
def test_wrong_numbers(name):
    with pytest.raises(ConfigError, match=f"{name}=0"):
        ExpertLoadMonitor(**{name: 0})
