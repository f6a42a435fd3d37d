"""torch.compile in all the ways that people use: same numbers, same names, same checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from strategy.models import D_IN, D_MODEL, Case, RankBatches, make_batches
from strategy.tracing import make_trainer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from lightning_fastmoe import MoE
from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.sources.single_file import open_file
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import moe_layers
from lightning_fastmoe.strategy.compiled import unwrap_compiled

WAYS = ("attribute", "method", "list", "blocks", "module", "whole", "engine", "late")


class Block(nn.Module):
    """A normalised MoE layer on a residual stream."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D_MODEL)
        self.moe = MoE(D_MODEL, 20, experts, 2, load_balancing=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Inner(nn.Module):
    """Two blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(D_IN, D_MODEL), nn.Linear(D_MODEL, 1)
        self.blocks = nn.ModuleList(Block(experts) for experts in (4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Model(pl.LightningModule):
    """What is compiled is said by ``way``; "plain" is nothing."""

    def __init__(self, case: Case, way: str, backend: str = "eager") -> None:
        super().__init__()
        self.case, self.way, self.backend = case, way, backend
        self.batch_losses: list[float] = []
        net: Any = Inner()
        if way == "method":
            net.compile(backend=backend)
        if way == "attribute":
            net = torch.compile(net, backend=backend)
        for i, block in enumerate(net.blocks):
            if way == "list":
                net.blocks[i] = torch.compile(block, backend=backend)
            if way == "blocks":
                block.compile(backend=backend)
            if way == "graph":
                block.compile(backend=backend, fullgraph=True, dynamic=True)
        self.net = net
        if way == "module":
            self.compile(backend=backend)

    def on_train_start(self) -> None:
        if self.way == "engine":
            self.trainer.strategy.deepspeed_engine.compile(backend=self.backend)
        if self.way == "late":
            self.net = torch.compile(self.net, backend=self.backend)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        target = torch.sin(3 * batch.sum(-1, keepdim=True))
        loss = (self.net(batch) - target).square().mean()
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.batch_losses.append(float(outputs["loss"]))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.net(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Tensor]:
        batches = make_batches(self.case)[:, :, self.trainer.global_rank].flatten(0, 1)
        return DataLoader(RankBatches(batches), batch_size=None)

    val_dataloader = train_dataloader


@dataclass
class Outcome:
    """What a run did: its losses, the loss of validating after it, and its layers' names.

    ``graphs`` is how many torch.compile has made.
    """

    losses: list[float]
    validated: float
    graphs: int
    layers: list[str]
    checkpoint: dict[str, Tensor] = field(default_factory=dict)


def train(
    case: Case,
    way: str,
    path: Path,
    resumed: Path | None = None,
    backend: str = "eager",
    epochs: int = 2,
) -> Outcome:
    """Trains, saves to ``path`` and validates a model compiled in one way."""
    pl.seed_everything(7, verbose=False)
    torch._dynamo.reset()
    counters.clear()
    model = Model(case, way, backend)
    epochs = 1 if resumed is None else epochs
    trainer = make_trainer(case, max_steps=-1, max_epochs=epochs, limit_val_batches=0)
    given = torch.compile(model, backend=model.backend) if way == "whole" else model
    # What ZeRO 3's hooks make of it is compiled again and again, up to this limit.
    with torch._dynamo.config.patch(recompile_limit=2):
        trainer.fit(given, ckpt_path=resumed)
    trainer.save_checkpoint(path)
    graphs = counters["stats"]["unique_graphs"]
    validated = 0.0
    names = [name for name, _ in moe_layers(model)]
    assert [layer.layer_name for _, layer in moe_layers(model)] == names
    assert not any("_orig_mod" in name for name, _ in model.named_parameters())
    (validated,) = make_trainer(
        case, strategy=trainer.strategy.__class__(case.ep, case.stage)
    ).validate(given, verbose=False)
    with CheckpointReader(path) as reader:
        tensors = {name: reader.read(name) for name in reader.manifest.tensors}
    if way == "whole":  # once the Trainer is done, it is as it was
        assert not {"forward", "training_step"} & vars(model).keys()
    return Outcome(model.batch_losses, validated, graphs, names, tensors)


def all_ways(
    case: Case, folder: str, ways: tuple[str, ...], backend: str = "eager"
) -> dict[str, Outcome]:
    """A second epoch in each way, from the checkpoint of a plain first one.

    "back" is a plain third epoch from the checkpoint of the first way, "third" one from plain's.
    """
    path = Path(folder)
    train(case, "plain", path / "first")
    outcomes = {
        way: train(case, way, path / way, path / "first", backend=backend)
        for way in ("plain", *ways)
    }
    outcomes["third"] = train(case, "plain", path / "third", path / "plain", epochs=3)
    outcomes["back"] = train(case, "plain", path / "back", path / ways[0], epochs=3)
    return outcomes


CASE = Case(world=2, ep=2, num_experts=(4, 6), steps=2)
# Tracing through the hooks of ZeRO 3 takes seconds each time.
SOME = ("attribute", "blocks", "whole", "late")


@pytest.mark.parametrize(("stage", "ways"), [(1, ("attribute", "whole")), (2, WAYS), (3, SOME)])
def test_compiled_equals_plain(
    stage: int, ways: tuple[str, ...], tmp_path: Path, rank_pool
) -> None:
    """Bit by bit, as the back end "eager" computes what the plain model does."""
    case = replace(CASE, stage=stage)
    for outcomes in rank_pool.run(all_ways, 2, case, str(tmp_path), ways, timeout=300):
        plain = outcomes["plain"]
        assert plain.layers == ["net.blocks.0.moe", "net.blocks.1.moe"]
        assert plain.graphs == 0
        assert outcomes["whole"].validated == plain.validated != 0
        pairs = [*((plain, outcomes[way]) for way in ways), (outcomes["third"], outcomes["back"])]
        for way, (expected, outcome) in zip([*ways, "back"], pairs, strict=True):
            assert (outcome.graphs > 0) == (way != "back"), way
            assert len(outcome.losses) == CASE.steps
            assert outcome.losses == expected.losses, way
            assert outcome.layers == expected.layers, way
            assert outcome.checkpoint.keys() == expected.checkpoint.keys(), way
            for name, value in expected.checkpoint.items():
                assert torch.equal(outcome.checkpoint[name], value), (way, name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_as_one_graph_equal_plain(ranks: int, tmp_path: Path, rank_pool) -> None:
    """``fullgraph=True`` traces the layers; on two ranks, with their exchange as an operator."""
    case = Case(world=ranks, ep=ranks, stage=2, num_experts=(4, 6), steps=2)
    arguments = (case, str(tmp_path), ("graph",), "aot_eager")
    for outcomes in rank_pool.run(all_ways, ranks, *arguments, timeout=200):
        expected, outcome = outcomes["plain"], outcomes["graph"]
        assert outcome.graphs > 0
        assert len(outcome.losses) == case.steps
        assert outcome.losses == expected.losses
        for name, value in expected.checkpoint.items():
            assert torch.equal(outcome.checkpoint[name], value), name


def test_hooks_on_the_wrapper_are_refused() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    inner[0] = torch.compile(inner[0], backend="eager")
    inner[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="'model.0'.*module.compile"):
        unwrap_compiled(nn.ModuleDict({"model": inner}))


def test_layers_have_no_wrapper_in_their_names() -> None:
    """Without a strategy, too."""
    layer = MoE(4, 8, 2, top_k=1)
    inside = nn.Sequential(torch.compile(layer, backend="eager"))
    for module, name in ((inside, "0"), (torch.compile(inside), "0"), (torch.compile(layer), "")):
        assert [name for name, _ in moe_layers(module)] == [name]


@pytest.mark.parametrize("name", ["weights.pt", "lightning.ckpt", "weights.safetensors"])
def test_files_of_compiled_models_that_others_wrote(name: str, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(2, 3))
    compiled = torch.compile(nn.Sequential(torch.compile(plain[0], backend="eager")))
    state = compiled.state_dict()
    assert set(state) == {"_orig_mod.0._orig_mod.weight", "_orig_mod.0._orig_mod.bias"}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if path.suffix == ".ckpt" else state, path)
    source = open_file(path, trusted=False)
    assert set(source.tensors) == {f"weights/{name}" for name in plain.state_dict()}
    row = torch.empty(2)
    source.read_into("weights/0.weight", 2, row)
    assert torch.equal(row, plain[0].weight[1])
