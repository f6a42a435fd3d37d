"""``load_from_checkpoint`` of a plain module, and other strategies, on checkpoints of ours."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import lightning_fabric.utilities.cloud_io
import pytest
import pytorch_lightning as pl
import torch
from checkpoint.format.forgeries import damage
from lightning_fabric.plugins.io import torch_io
from pytorch_lightning.core import saving
from strategy.expert_modules import build_modules
from strategy.models import Case, build_net, loss_of, make_batches, make_optimizer
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe.cli import main
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.lightning_loaders import register_loaders
from lightning_fastmoe.strategy.checkpointing import plain_loading


class Counter(nn.Module):
    """A module with an extra state."""

    count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


class Plain(pl.LightningModule):
    """A module as users write it, with hyperparameters and hooks; no class of ours but MoE."""

    def __init__(self, experts: str = "stacked", width: int = 3, origin: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        coefficients = (0.01, 0.001)
        self.net = (
            build_net((4, 8), coefficients) if experts == "stacked" else build_modules(experts)
        )
        self.extra = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.extra.weight
        self.counter = Counter()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.loaded: dict[str, Any] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += 1
        self.counter.count += 1
        return loss_of(self.net, batch) + self.extra.weight.square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = (1, 2)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = {"mine": checkpoint["mine"], "epoch": checkpoint["epoch"]}


class Data(pl.LightningDataModule):
    """Its state is in the checkpoint."""

    def __init__(self, case: Case, place: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="case")
        self.case, self.place = case, place

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank = self.trainer.global_rank
        return DataLoader(list(make_batches(self.case)[:, 0, rank]), batch_size=None)

    val_dataloader = train_dataloader

    def state_dict(self) -> dict[str, int]:
        return {"place": 7}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def train(case: Case, path: str, hyperparameters: dict[str, Any]) -> dict[str, Tensor]:
    """Three steps, then saves; the weights of all experts."""
    pl.seed_everything(5, verbose=False)
    module = Plain(**hyperparameters)
    weights: dict[str, Tensor] = {}

    class AtEnd(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            weights.update({n: w.cpu() for n, w in whole_weights(pl_module).items()})

    trainer = make_trainer(case, callbacks=[AtEnd()])
    trainer.fit(module, datamodule=Data(case))
    trainer.save_checkpoint(path)
    return weights


@pytest.fixture(scope="module")
def trained(rank_pool, tmp_path_factory):
    """(a checkpoint of two ranks, the weights that it must hold)."""
    path = tmp_path_factory.mktemp("plain") / "last.ckpt"
    weights = rank_pool.run(train, 2, Case(2, 2, 3), str(path), {"width": 5})
    return path, weights[0]


def assert_holds(module, weights) -> None:
    state = dict(module.named_parameters())
    assert state.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(state[name], weight), name


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_plain_module(trained, kind):
    path, weights = trained
    module = Plain.load_from_checkpoint(kind(path))
    assert_holds(module, weights)
    assert module.hparams["width"] == 5, "hyperparameters are those of the run"
    assert module.tied.weight is module.extra.weight
    assert int(module.seen) == 3
    assert module.counter.count == 3
    assert module.loaded == {"mine": (1, 2), "epoch": 1}


@pytest.mark.parametrize("case", [Case(2, 1, 1), Case(2, 2, 2)], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("experts", ["stacked", "list"])
def test_every_stage_and_kind_of_experts(rank_pool, tmp_path, case, experts):
    path = tmp_path / "a.ckpt"
    weights = rank_pool.run(train, 2, case, str(path), {"experts": experts})[0]
    assert_holds(Plain.load_from_checkpoint(path), weights)


def test_arguments_win_over_hyperparameters(trained):
    path, weights = trained
    with pytest.raises(RuntimeError, match="size mismatch for extra.weight"):
        Plain.load_from_checkpoint(path, width=4)
    assert_holds(Plain.load_from_checkpoint(path, origin="mine"), weights)


class Deeper(Plain):
    """Has a layer that the checkpoint lacks."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.deeper = torch.nn.Linear(2, 2)


def test_strict(trained):
    path, weights = trained
    with pytest.raises(RuntimeError, match="Missing key.*deeper.weight"):
        Deeper.load_from_checkpoint(path)
    module = Deeper.load_from_checkpoint(path, strict=False)
    del module.deeper
    assert_holds(module, weights)


LOCATIONS = {
    "cpu": "cpu",
    "meta": "meta",
    "device": torch.device("meta"),
    "map": {"cpu": "meta"},
    "other map": {"cuda:0": "cuda:1"},
    "function": lambda storage, location: {"cpu": torch.UntypedStorage(1, device="meta")}[location],
    "function without an answer": lambda storage, location: None,
}


@pytest.mark.parametrize("name", LOCATIONS)
def test_map_location(trained, name):
    path, weights = trained
    state = saving.pl_load(path, map_location=LOCATIONS[name])["state_dict"]
    is_meta = name in ("meta", "device", "map", "function")
    assert {state[n].device.type for n in weights} == {"meta" if is_meta else "cpu"}
    if not is_meta:
        module = Plain.load_from_checkpoint(path, map_location=LOCATIONS[name])
        assert_holds(module, weights)


def test_a_link_and_a_data_module(trained, tmp_path):
    path, weights = trained
    (tmp_path / "link.ckpt").symlink_to(path)
    assert_holds(Plain.load_from_checkpoint(tmp_path / "link.ckpt"), weights)
    assert Data.load_from_checkpoint(path, case=Case()).place == 7


def test_hyperparameters_that_are_no_plain_data(rank_pool, tmp_path):
    path = tmp_path / "a.ckpt"
    rank_pool.run(train, 1, Case(), str(path), {"origin": PurePosixPath("/data")})
    with pytest.raises(CheckpointError, match=r"PurePosixPath.*pass weights_only=False"):
        Plain.load_from_checkpoint(path)
    module = Plain.load_from_checkpoint(path, weights_only=False)
    assert module.hparams["origin"] == PurePosixPath("/data")
    with torch.serialization.safe_globals([PurePosixPath]):
        assert Plain.load_from_checkpoint(path).hparams["origin"] == PurePosixPath("/data")


def test_a_damaged_checkpoint(rank_pool, tmp_path):
    path = tmp_path / "a.ckpt"
    rank_pool.run(train, 1, Case(), str(path), {})
    damage(path, "weights_00000.safetensors", "flipped")
    with pytest.raises(CheckpointError, match=r"weights_00000.safetensors is damaged"):
        Plain.load_from_checkpoint(path)


def test_other_files_are_loaded_as_before(trained, tmp_path):
    path, weights = trained
    file = tmp_path / "model.ckpt"
    assert main(["checkpoint", "consolidate", str(path), str(file)]) == 0
    state = torch.load(file, weights_only=True)
    torch.save({**state, "mine": 1}, file)
    module = Plain.load_from_checkpoint(file)
    assert_holds(module, weights)
    assert module.counter.count == 3
    with pytest.raises(IsADirectoryError):
        Plain.load_from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        Plain.load_from_checkpoint(tmp_path / "none.ckpt")


def test_registering_again_changes_nothing():
    before = saving.pl_load, torch_io.pl_load
    register_loaders(lambda: plain_loading)
    assert (saving.pl_load, torch_io.pl_load) == before
    assert before[0].__wrapped__ is lightning_fabric.utilities.cloud_io._load
    assert lightning_fabric.utilities.cloud_io._load.__module__.startswith("lightning_fabric")


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_another_strategy_says_what_to_type(trained, method):
    path, _ = trained
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=2, **dict.fromkeys(quiet, False))
    run = getattr(trainer, method)
    command = f"`lightning-fastmoe checkpoint consolidate {path} model.ckpt`"
    with pytest.raises(CheckpointError) as caught:
        run(Plain(width=5), datamodule=Data(Case()), ckpt_path=path)
    assert command in str(caught.value)
    assert "strategy=FastMoEStrategy()" in str(caught.value)
