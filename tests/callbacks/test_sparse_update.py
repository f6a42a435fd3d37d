"""SparseUpdate on one process: what is trained, what has no graph, and what is refused."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from callbacks.blocks import Block, Blocks, Late
from callbacks.model import D_MODEL, Model, make_trainer
from torch import nn

from lightning_fastmoe import RouterBiasBalancing, SparseUpdate
from lightning_fastmoe.errors import CheckpointError, ConfigError

CASES = [
    ({}, lambda name: True),
    ({"last_layers": 2}, lambda n: n.startswith(("blocks.9.", "blocks.10.", "readout"))),
    ({"last_layers": 11}, lambda n: not n.startswith("embedding")),
    (
        {"last_layers": 1, "dense": False},
        lambda n: n.startswith("blocks.10.moe.experts."),
    ),
    (
        {"last_layers": 1, "experts": "none"},
        lambda n: n.startswith(("blocks.10.", "readout")) and ".experts." not in n,
    ),
    ({"dense": False}, lambda n: ".moe.experts." in n),
]


@pytest.mark.parametrize(("options", "is_trained"), CASES)
def test_trains_its_part_exactly_and_nothing_else(tmp_path, options, is_trained):
    full, model = Blocks(), Blocks()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make_trainer(tmp_path).fit(full)
    trainer = make_trainer(tmp_path, SparseUpdate(**options))
    trainer.fit(model)
    trained = {name for name in before if is_trained(name)}
    assert trained
    assert set(model.gradients) == trained
    for name in trained:
        assert torch.equal(model.gradients[name], full.gradients[name]), name
    state = trainer.optimizers[0].state
    for name, parameter in model.named_parameters():
        assert (parameter in state) is (name in trained), name
        assert torch.equal(parameter, before[name]) is (name not in trained), name


def test_the_prefix_has_no_graph_and_the_rest_has_one(tmp_path):
    model, seen = Blocks(), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, out: seen.append(out.grad_fn is not None))
    make_trainer(tmp_path, SparseUpdate(last_layers=3), max_steps=1).fit(model)
    assert seen == [False] * 8 + [True] * 3


def test_nothing_is_saved_for_backward_by_the_prefix():
    model, saved = Blocks(), []
    SparseUpdate(last_layers=1).apply(model)
    x = model.embedding(torch.arange(6)[None])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for block in model.blocks[:-1]:
            x = block(x)
        assert not saved
        model.blocks[-1](x)
    assert saved


def test_models_of_configure_model_apply_it_themselves(tmp_path):
    model, callback = Late(0), SparseUpdate(last_layers=1)
    model.callback = callback
    make_trainer(tmp_path, callback).fit(model)
    assert {n.split(".moe")[0].split(".dense")[0] for n in model.gradients} == {
        "blocks.1",
        "readout.weight",
    }
    with pytest.raises(ConfigError, match="at the end of configure_model"):
        make_trainer(tmp_path, SparseUpdate(last_layers=1)).fit(Late(0))


def test_a_run_resumes_with_its_selection_alone(tmp_path):
    def fit(epochs, path=None, **options):
        model = Blocks(4)
        trainer = make_trainer(tmp_path, SparseUpdate(**options), max_epochs=epochs)
        trainer.fit(model, ckpt_path=path)
        return trainer, model

    _, whole = fit(2, last_layers=2)
    trainer, _ = fit(1, last_layers=2)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    _, resumed = fit(2, path, last_layers=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for other in ({"last_layers": 1}, {"last_layers": 2, "dense": False}, {}):
        with pytest.raises(CheckpointError, match="another selection"):
            fit(2, path, **other)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"last_layers": 0}, "last_layers=0"),
        ({"last_layers": True}, "last_layers=True"),
        ({"last_layers": 1.0}, "last_layers=1.0"),
        ({"experts": "by_size"}, "experts='by_size' is not supported"),
        ({"experts": "by_load"}, "a share of tokens, a budget"),
        ({"experts": "by_gate", "share": 2}, "share=2 must be in"),
        ({"experts": "by_gate", "share": 0.2, "batches": 0}, "batches=0 must be"),
        ({"experts": "all", "share": 0.2}, "share=0.2 .* use 'by_load'"),
        ({"experts": "none", "dense": False}, "trains nothing"),
        ({"layers": "blocks"}, "no effect"),
    ],
)
def test_refused_arguments(options, match):
    with pytest.raises(ConfigError, match=match):
        SparseUpdate(**options)


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lambda: Blocks(2), {"last_layers": 3}, "more than the 2 blocks of 'blocks'"),
        (lambda: Blocks(2, tied=True), {"last_layers": 1}, "'readout.weight' is tied"),
        (lambda: Blocks(2), {"last_layers": 1, "layers": "readout"}, "not the name"),
        (Model, {"last_layers": 1}, r"in \['none'\]"),
        (pl.LightningModule, {}, "no MoE layer"),
    ],
)
def test_refused_models(make, options, match):
    with pytest.raises(ConfigError, match=match):
        SparseUpdate(**options).apply(make())


def test_two_lists_of_blocks_need_a_name():
    model = Blocks(2)
    model.others = nn.ModuleList([Block(), nn.Linear(1, 1)])
    with pytest.raises(ConfigError, match=r"\['blocks', 'others'\]"):
        SparseUpdate(last_layers=1).apply(model)
    model.plain = nn.ModuleList([nn.Linear(1, 1)])
    with pytest.raises(ConfigError, match="'plain' holds no MoE layer"):
        SparseUpdate(last_layers=1, layers="plain").apply(model)
    SparseUpdate(last_layers=1, layers="blocks").apply(model)
    assert model.others[1].weight.requires_grad
    assert not model.blocks[0].dense.weight.requires_grad


def test_a_model_without_anything_to_train_is_refused():
    model = Blocks(2)
    model.blocks[1].requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        SparseUpdate(last_layers=1, dense=False).apply(model)


def test_a_graph_in_the_prefix_is_refused(tmp_path):
    model = Blocks(2)
    model.embedding.register_forward_hook(lambda m, i, out: out.requires_grad_())
    with pytest.raises(ConfigError, match="requires gradients"):
        make_trainer(tmp_path, SparseUpdate(last_layers=1)).fit(model)
    assert not model.blocks[1]._forward_pre_hooks  # the check does not outlive the fit


def test_frozen_modules_that_training_would_change_are_refused(tmp_path):
    model = Blocks(2)
    model.blocks[0].norm = nn.BatchNorm1d(D_MODEL)
    with pytest.raises(ConfigError, match=r"'blocks\.0\.norm' is frozen"):
        make_trainer(tmp_path, SparseUpdate(last_layers=1)).fit(model)
    model = Blocks(2, router="sigmoid", load_balancing=0)
    with pytest.raises(ConfigError, match=r"balance bias of 'blocks\.0\.moe'"):
        make_trainer(tmp_path, SparseUpdate(last_layers=1), RouterBiasBalancing()).fit(model)
