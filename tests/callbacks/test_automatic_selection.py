"""SparseUpdate that chooses experts itself: those of select_experts, and nothing is used up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callbacks.blocks import Blocks, Late
from callbacks.model import BATCH, TOKENS, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from lightning_fastmoe import SparseUpdate, select_experts
from lightning_fastmoe.errors import CheckpointError, ConfigError, DataError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts.trained import trained_of

STEPS = 5


class Noisy(Dataset[Tensor]):
    """Samples that draw from every generator there is, its own included."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)
        self.own = np.random.default_rng(5)

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> Tensor:
        numbers = [
            index,
            random.randrange(11),  # noqa: S311
            int(np.random.randint(11)),  # noqa: NPY002  the global one
            int(torch.randint(11, ())),
            int(torch.randint(11, (), generator=self.generator)),
            int(self.own.integers(11)),
        ]
        return torch.tensor(numbers) % 11


class Stream(IterableDataset[Tensor]):
    """Begins anew with each iterator."""

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(STEPS * BATCH):
            yield torch.randint(11, (TOKENS,))


class Once(Stream):
    """Goes on where the last iterator has ended, by a closure that copies share."""

    def __init__(self) -> None:
        self.rest = iter([torch.full((TOKENS,), i % 11) for i in range(40)])
        self.take = lambda rest=self.rest: next(rest)
        del self.rest

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(STEPS * BATCH):
            yield self.take()


class Seen(Blocks):
    """Keeps what it is trained on, and draws numbers, logs and remembers in its steps."""

    def __init__(self, data: Any = None, **loader: Any) -> None:
        super().__init__(3)
        self.data, self.loader = Noisy() if data is None else data, loader
        self.batches: list[Tensor] = []
        self.drawn: list[float] = []
        self.modes: list[bool] = []
        self.register_buffer("steps_taken", torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        self.drawn.append(float(torch.rand(())))
        self.steps_taken += 1
        WATCHED.append((self.training, torch.is_grad_enabled(), batch))
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True, prog_bar=True)
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.data, BATCH, **self.loader)


WATCHED: list[tuple[bool, bool, Tensor]] = []


def fit(tmp_path, model: Seen, experts: Any, path: Any = None, epochs: int = 1, **options: Any):
    WATCHED.clear()
    pl.seed_everything(5, verbose=False)
    update = SparseUpdate(experts=experts, **options)
    trainer = make_trainer(tmp_path, update, max_epochs=epochs)
    trainer.fit(model, ckpt_path=path)
    return trainer, update


def chosen(model: nn.Module) -> dict[str, list[int]]:
    found = {n: trained_of(layer.experts) for n, layer in expert_layers(model)}
    return {n: list(part.expert_ids) for n, part in found.items() if part is not None}


LOADERS: list[tuple[Any, dict[str, Any]]] = [
    (Noisy, {}),
    (Noisy, {"shuffle": True}),
    (Noisy, {"sampler": RandomSampler(range(STEPS * BATCH))}),
    (Noisy, {"shuffle": True, "generator": torch.Generator().manual_seed(1)}),
    (Stream, {}),
]


@pytest.mark.parametrize(("data", "loader"), LOADERS)
@pytest.mark.parametrize(
    ("experts", "options"), [("by_load", {"share": 0.4}), ("by_gate", {"budget": 3})]
)
def test_trains_as_if_the_chosen_experts_were_named(tmp_path, data, loader, experts, options):
    own = loader.get("generator")
    state = own.get_state() if own is not None else None
    model = Seen(data(), **loader)
    fit(tmp_path, model, experts, batches=3, **options)
    looked = [batch for training, _, batch in WATCHED if not training]
    assert [grad for training, grad, _ in WATCHED if not training] == [False] * 3
    assert len(model.batches) == len(WATCHED) - 3 == STEPS == int(model.steps_taken)
    for seen, batch in zip(looked, model.batches, strict=False):
        if data is Noisy:  # the same samples in the same order; their noise is drawn between steps
            assert torch.equal(seen[:, 0], batch[:, 0])
    named = chosen(model)
    assert named == select_experts(Seen(), looked, experts.removeprefix("by_"), **options)
    if own is not None:
        own.set_state(state)
    other = Seen(data(), **loader)
    fit(tmp_path, other, named)
    assert model.drawn == other.drawn
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(model.batches, other.batches, strict=True))


def test_workers_are_not_needed_to_look(tmp_path):
    loader = {"num_workers": 1, "persistent_workers": True}
    model = Seen(torch.arange(60).view(10, 6) % 11, **loader)
    fit(tmp_path, model, "by_load", batches=2, share=0.3)
    assert torch.equal(torch.cat(model.batches), model.data)


def test_only_trained_blocks_are_chosen_from(tmp_path):
    model = Seen()
    fit(tmp_path, model, "by_load", last_layers=2, budget=3, dense=False)
    parts = {n for n, _ in model.named_modules() if n.endswith(".trained")}
    assert parts <= {"blocks.1.moe.experts.trained", "blocks.2.moe.experts.trained"}
    ids = [i for n in parts for i in model.get_submodule(n).expert_ids]
    assert len(ids) == 3


def test_resuming_takes_the_selection_of_the_checkpoint(tmp_path):
    path, options = tmp_path / "x.ckpt", {"batches": 2, "share": 0.3}
    whole = Seen()
    fit(tmp_path, whole, "by_load", epochs=2, **options)
    model = Seen()
    trainer, _ = fit(tmp_path, model, "by_load", **options)
    trainer.save_checkpoint(path)
    resumed = Seen(torch.zeros(STEPS * BATCH, TOKENS, dtype=torch.int64))  # would choose others
    fit(tmp_path, resumed, "by_load", path, epochs=2, **options)
    assert all(training for training, *_ in WATCHED)
    assert chosen(resumed) == chosen(whole)
    with pytest.raises(CheckpointError, match="another selection"):
        fit(tmp_path, Seen(), "by_load", path, epochs=2, last_layers=3, **options)
    trainer, _ = fit(tmp_path, Seen(), "all")
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"trained with SparseUpdate\(experts='all'\)"):
        fit(tmp_path, Seen(), "by_load", path, epochs=2, **options)
    trainer = make_trainer(tmp_path)
    trainer.fit(Seen())
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match="saved without SparseUpdate"):
        fit(tmp_path, Seen(), "by_load", path, epochs=2, **options)


def test_a_second_fit_keeps_the_selection_and_another_model_gets_its_own(tmp_path):
    model = Seen()
    _, update = fit(tmp_path, model, "by_load", share=0.3)
    before = chosen(model)
    WATCHED.clear()
    make_trainer(tmp_path, update).fit(model)
    assert chosen(model) == before
    assert all(training for training, *_ in WATCHED)
    other = Seen(torch.full((STEPS * BATCH, TOKENS), 3))
    make_trainer(tmp_path, update).fit(other)
    assert chosen(other) != before
    model.requires_grad_(True)
    fit(tmp_path, model, "by_gate", budget=3)
    assert sum(map(len, chosen(model).values())) == 3


def test_models_of_configure_model_need_no_apply(tmp_path):
    model = Late(0)
    make_trainer(tmp_path, SparseUpdate(experts="by_load", share=0.3)).fit(model)
    assert chosen(model)
    model, callback = Late(0), SparseUpdate(experts="by_load", share=0.3)
    model.callback = callback
    with pytest.raises(ConfigError, match=r"don't call apply\(\)"):
        make_trainer(tmp_path, callback).fit(model)
    assert "configure_optimizers" not in vars(model)


class Manual(Seen):
    """Optimizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Uses(Seen):
    """Needs its optimizer in a step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


class Two(Seen):
    """Has two loaders."""

    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader(), "b": super().train_dataloader()}


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda: Seen(Once()), DataError, "Batches of .* can't be looked at without using them up"),
        (lambda: Two(), DataError, "from 2 loaders"),
        (lambda: Manual(), ConfigError, "optimizes by itself"),
        (lambda: Seen([]), DataError, "no training batch"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, model, error, match):
    refused = model()
    with pytest.raises(error, match=match) as said:
        fit(tmp_path, refused, "by_load", share=0.3)
    assert "\n" not in str(said.value)
    assert "configure_optimizers" not in vars(refused)


def test_an_error_of_the_step_says_when_it_ran(tmp_path):
    with pytest.raises(AttributeError) as said:
        fit(tmp_path, Uses(), "by_load", share=0.3)
    assert any("before the optimizers exist" in note for note in said.value.__notes__)


class Early(Seen):
    """Makes its optimizer before experts are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


@pytest.mark.parametrize(("experts", "options"), [("by_load", {"share": 0.3}), ({0: [1]}, {})])
def test_optimizers_that_would_not_train_the_experts_are_refused(tmp_path, experts, options):
    with pytest.raises(ConfigError, match=r"up_proj', which SparseUpdate trains.*make the"):
        fit(tmp_path, Early(), experts, **options)


def test_strategies_that_wrap_the_model_first_are_refused(tmp_path):
    update = SparseUpdate(experts="by_load", share=0.3)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy="ddp", callbacks=[update], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="don't work with DDPStrategy"):
        trainer.fit(Seen())
