"""SparseUpdate of single experts on one process: what is trained, kept, saved and refused."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from callbacks.blocks import Block, Blocks, Late
from callbacks.model import D_FFN, D_MODEL, make_trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lightning_fastmoe import MoE, SparseUpdate
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.planning.sizes import model_size

EXPERTS = {"blocks.1.moe": [0, 3], 2: [2]}
IDS = {"blocks.1.moe": [0, 3], "blocks.2.moe": [2]}


def initial(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"router": "switch", "top_k": 1}])
@pytest.mark.parametrize("dense", [True, False])
def test_trains_these_experts_exactly_and_nothing_else(tmp_path, options, dense):
    torch.manual_seed(0)
    full, model = Blocks(3, **options), Blocks(3, **options)
    before = initial(model)
    make_trainer(tmp_path).fit(full)
    trainer = make_trainer(tmp_path, SparseUpdate(experts=EXPERTS, dense=dense), max_steps=5)
    model.steps = 5
    trainer.fit(model)
    names = {n for n in full.gradients if ".experts." in n}
    wanted = {
        f"{layer}.experts.trained.{name.rpartition('.')[2]}": full.gradients[name][ids]
        for layer, ids in IDS.items()
        for name in names
        if name.startswith(f"{layer}.experts.")
    }
    if dense:
        wanted |= {n: g for n, g in full.gradients.items() if n not in names}
    assert model.gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(model.gradients[name], gradient), name
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        layer, is_expert, _ = name.partition(".experts.")
        for i in range(len(value)) if is_expert else ():
            is_trained = i in IDS.get(layer, ())
            assert torch.equal(value[i], before[name][i]) is not is_trained, (name, i)
    state = trainer.optimizers[0].state
    elements = sum(s["exp_avg"].numel() for s in state.values())
    assert elements == sum(gradient.numel() for gradient in wanted.values())


def test_a_list_means_each_trained_layer(tmp_path):
    model = Blocks(3)
    SparseUpdate(last_layers=2, experts=[3, 1], dense=False).apply(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".trained.")[0] for n in trained} == {
        "blocks.1.moe.experts",
        "blocks.2.moe.experts",
    }
    whole = model.blocks[1].moe.experts.up_proj
    assert torch.equal(trained["blocks.1.moe.experts.trained.up_proj"], whole[[1, 3]])
    assert "experts 1, 3" in repr(model)


def test_a_run_resumes_and_state_dicts_are_whole(tmp_path):
    def fit(epochs, path=None, experts=EXPERTS):
        model = Blocks(3)
        trainer = make_trainer(tmp_path, SparseUpdate(experts=experts), max_epochs=epochs)
        trainer.fit(model, ckpt_path=path)
        return trainer, model

    _, whole = fit(2)
    trainer, saved = fit(1)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    _, resumed = fit(2, path)
    plain = Blocks(3)
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    tokens = torch.arange(6)[None]
    assert torch.equal(plain(tokens), saved(tokens))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for other in ({"blocks.1.moe": [0, 2], 2: [2]}, {"blocks.1.moe": [0, 3]}, [0], "all"):
        with pytest.raises((CheckpointError, ValueError)) as refused:
            fit(2, path, other)
        # torch itself refuses an optimizer of other groups before callbacks see the checkpoint
        assert "another selection" in str(refused.value) or "parameter group" in str(refused.value)


def test_another_selection_of_the_same_model(tmp_path):
    model, tokens = Blocks(3), torch.arange(6)[None]
    make_trainer(tmp_path, SparseUpdate(experts=EXPERTS)).fit(model)
    first, out = initial(model), model(tokens)
    model.requires_grad_(True)  # freezing lasts
    make_trainer(tmp_path, SparseUpdate(experts={0: [1]}, dense=False)).fit(model)
    for name, value in model.state_dict().items():
        layer, is_expert, _ = name.partition(".experts.")
        for i in range(len(value)) if is_expert else ():
            is_trained = (layer, i) == ("blocks.0.moe", 1)
            assert torch.equal(value[i], first[name][i]) is not is_trained, (name, i)
    model.load_state_dict(first)
    assert torch.equal(model(tokens), out)
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"SparseUpdate\.release\(model\)"):
        model(tokens)
    SparseUpdate.release(model)
    assert {n for n, _ in model.named_parameters()} == set(first)
    assert torch.equal(model(tokens), out)
    model(tokens).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_second_derivatives_and_retained_graphs():
    torch.manual_seed(1)
    full = MoE(D_MODEL, D_FFN, 4, 2).double()
    x = torch.randn(9, D_MODEL, dtype=torch.float64, requires_grad=True)

    def norms(layer, weight, ids):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        out = layer(x).sum()
        once = torch.autograd.grad(out, weight, retain_graph=True)[0]
        twice = torch.autograd.grad(out, weight)[0]
        assert torch.equal(once, twice)
        return second[ids], once[ids]

    wanted = norms(full, full.experts.up_proj, [1, 2])
    SparseUpdate(experts=[1, 2]).apply(full_model := nn.Sequential(full))
    found = norms(full, full_model[0].experts.trained.up_proj, slice(None))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], wanted[1])


def test_functional_call_computes_with_its_own_parameters():
    torch.manual_seed(2)
    model, x = nn.Sequential(MoE(D_MODEL, D_FFN, 4, 2)), torch.randn(9, D_MODEL)
    stack = model[0].experts.up_proj.detach().clone()
    stack[[1, 2]] *= 2
    wanted = torch.func.functional_call(model, {"0.experts.up_proj": stack}, (x,))
    SparseUpdate(experts=[1, 2]).apply(model)
    own = {"0.experts.trained.up_proj": stack[[1, 2]]}
    assert torch.equal(torch.func.functional_call(model, own, (x,)), wanted)


@pytest.mark.parametrize(
    ("experts", "match"),
    [
        ({}, "selects nothing"),
        ([], "selects no expert"),
        ({"blocks.0.moe": []}, r"experts\['blocks.0.moe'\]=\[\] selects no expert"),
        ({0: [1, 1]}, "different ids"),
        ({0: [-1]}, "different ids"),
        ({0: [True]}, "different ids"),
        ({0: 1}, r"experts\[0\]=1 is not supported"),
        ({0.5: [1]}, "the key 0.5"),
        (3, "experts=3 is not supported"),
    ],
)
def test_refused_arguments(experts: Any, match: str):
    with pytest.raises(ConfigError, match=match) as refused:
        SparseUpdate(experts=experts)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"experts": {"moe": [1]}}, "'moe', which does not exist. The layers are 'blocks.0.moe'"),
        ({"experts": {5: [1]}}, "block 5, which has no MoE layers"),
        ({"experts": {"blocks.1.moe": [4]}}, "expert 4 of layer 'blocks.1.moe', which has 4"),
        ({"experts": [7]}, "expert 7 of layer 'blocks.0.moe'"),
        ({"experts": {0: [1]}, "last_layers": 2}, "'blocks.0.moe', which is before the trained"),
        ({"experts": {0: [1], "blocks.0.moe": [2]}}, "twice"),
    ],
)
def test_refused_selections_change_nothing(options: dict[str, Any], match: str):
    model = Blocks(3)
    with pytest.raises(ConfigError, match=match) as refused:
        SparseUpdate(**options).apply(model)
    assert "\n" not in str(refused.value)
    assert all(p.requires_grad and ".trained." not in n for n, p in model.named_parameters())


def test_experts_that_are_modules_and_averages_are_refused(tmp_path):
    model = Blocks(2)
    model.blocks[1].moe = MoE(D_MODEL, D_FFN, 4, 2, expert=lambda d, f: nn.Linear(d, d))
    with pytest.raises(ConfigError, match=r"'blocks\.1\.moe' are modules"):
        SparseUpdate(experts=[0]).apply(model)
    for averaging in (EMAWeightAveraging(), StochasticWeightAveraging(0.01)):
        with pytest.raises(ConfigError, match="WeightAveraging would average"):
            make_trainer(tmp_path, SparseUpdate(experts=[0]), averaging).fit(Blocks(2))


def test_indices_count_in_the_named_list():
    model = Blocks(2)
    model.others = nn.ModuleList([Block(), Block()])
    with pytest.raises(ConfigError, match=r"\['blocks', 'others'\]"):
        SparseUpdate(experts={1: [0]}).apply(model)
    SparseUpdate(experts={1: [0]}, layers="others").apply(model)
    named = [name for name, _ in model.named_modules() if name.endswith(".trained")]
    assert named == ["others.1.moe.experts.trained"]


def test_parameters_are_counted_once():
    model = Blocks(3)
    before = model_size(model)
    SparseUpdate(experts=EXPERTS).apply(model)
    assert model_size(model) == before


class Stem(Blocks):
    """Has a MoE layer before its blocks."""

    def __init__(self) -> None:
        super().__init__(0)
        del self.blocks
        self.stem = Block()
        self.blocks = nn.ModuleList([Block(), Block()])


def test_layers_before_the_blocks_are_in_the_frozen_prefix():
    with pytest.raises(ConfigError, match=r"'stem\.moe', which is before the trained blocks"):
        SparseUpdate(1, {"stem.moe": [0]}, layers="blocks").apply(Stem())
    model = Stem()
    SparseUpdate(1, [0], layers="blocks").apply(model)
    named = [name for name, _ in model.named_modules() if name.endswith(".trained")]
    assert named == ["blocks.1.moe.experts.trained"]


def test_negative_indices_are_no_layers_elsewhere():
    with pytest.raises(ConfigError, match="block -1, which has no MoE layers"):
        SparseUpdate(experts={-1: [0]}, layers="blocks").apply(Stem())


@pytest.mark.parametrize("experts", [{2: [1]}, [1]])
def test_layers_that_an_earlier_selection_froze_are_refused(experts):
    model = Blocks(3)
    SparseUpdate(experts={1: [1]}).apply(model)
    with pytest.raises(ConfigError, match=r"frozen.*requires_grad_\(True\)"):
        SparseUpdate(experts=experts).apply(model)
    model.requires_grad_(True)
    SparseUpdate(experts=experts).apply(model)
    assert model.blocks[2].moe.experts.trained.up_proj.requires_grad


def test_models_of_configure_model_apply_it_themselves(tmp_path):
    model, callback = Late(0), SparseUpdate(experts={1: [2]}, dense=False)
    model.callback = callback
    make_trainer(tmp_path, callback).fit(model)
    assert {n.partition(".trained.")[0] for n in model.gradients} == {"blocks.1.moe.experts"}
    with pytest.raises(ConfigError, match="at the end of configure_model"):
        make_trainer(tmp_path, SparseUpdate(experts={1: [2]}, dense=False)).fit(Late(0))


def test_a_selection_reads_from_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    text = (
        "callback: {class_path: lightning_fastmoe.SparseUpdate, init_args: {experts: "
        "{3: [0, 1], blocks.4.moe: [2]}}}"
    )
    read = parser.instantiate(parser.parse_string(text)).callback
    assert read.experts == {3: [0, 1], "blocks.4.moe": [2]}
