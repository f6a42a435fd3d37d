"""Single experts of transformers' models, in place: a masked twin's numbers, and exported files."""

from __future__ import annotations

import pytest
import torch
import transformers
from huggingface import single_experts_runs as runs
from huggingface.sharding_runs import Run, make_model, reference
from strategy.sparse_experts_runs import masked
from torch.utils.flop_counter import FlopCounterMode

from lightning_fastmoe import SparseUpdate, select_experts
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import add_lora
from lightning_fastmoe.nn.expert_layers import expert_layers

CASES = [("qwen3_moe", 2, 2), ("qwen3_moe", 2, 3), ("gpt_oss", 2, 3), ("gpt_oss", 1, 1)]
"""The second has biases and transposed weights, and takes no fused layer."""


def selection(model) -> dict[str, list[int]]:
    """Two experts of the first layer, both on the first of two ranks, and one of the last."""
    names = [name for name, _ in expert_layers(model)]
    return {names[0]: [0, 1], names[-1]: [3]}


@pytest.mark.parametrize(("name", "ep", "stage"), CASES)
def test_equals_masks_on_whole_stacks(name, ep, stage, rank_pool, tmp_path):
    run = Run(name, ep=ep, stage=stage, steps=3)
    experts = selection(make_model(run))
    model = make_model(run, "eager")
    with masked(model, experts) as before:
        expected = reference(run, model)
    path = tmp_path / "exported"
    results = rank_pool.run(runs.train, 2, run, experts, path)
    for norms, weights, _ in results:
        assert norms == pytest.approx(expected.norms, rel=1e-5)
        for found, wanted in zip(weights[1:], expected.weights, strict=True):
            for key, value in found.items():
                torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=2e-6)
                layer, is_expert, _ = key.partition(".experts.")
                for i in range(len(value)) if is_expert else ():
                    is_trained = i in experts.get(layer, ())
                    assert torch.equal(value[i], before[key][i]) is not is_trained, (key, i)
    whole = sum(p.numel() for p in before.values())
    frozen = sum(
        p.numel() - p[experts.get(n.partition(".experts.")[0], [])].numel()
        for n, p in before.items()
        if ".experts." in n
    )
    states = sum(count for _, _, count in results)
    assert whole - frozen <= states <= whole - frozen + 200  # ZeRO's padding
    exported = transformers.AutoModelForCausalLM.from_pretrained(path)
    for key, value in exported.state_dict().items():
        assert torch.equal(value, results[0][1][-1][key]), key


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_full_training_s(name):
    run = Run(name)
    full, model = make_model(run).train(), make_model(run).train()
    experts = selection(model)
    SparseUpdate(experts=experts).apply(model)
    ids = torch.arange(3, 24).view(3, 7)
    for one in (full, model):
        one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {n: p.grad for n, p in full.named_parameters()}
    for key, parameter in model.named_parameters():
        layer, is_trained, stack = key.partition(".experts.trained.")
        if is_trained:
            wanted = gradients[f"{layer}.experts.{stack}"][experts[layer]]
            assert torch.equal(parameter.grad, wanted), key
        elif ".experts." in key:
            assert parameter.grad is None, key
        else:
            assert torch.equal(parameter.grad, gradients[key]), key


@pytest.mark.parametrize("trained", [[1], [0, 2, 3]])
def test_frozen_experts_of_gpt_oss_cost_no_weight_gradients(trained):
    """Biased, transposed, interleaved and clamped."""
    model = make_model(Run("gpt_oss")).double()
    experts = model.model.layers[0].mlp.experts
    SparseUpdate(experts={0: trained}).apply(model)
    ids = torch.tensor([[0, 1], [1, 2], [1, 3], [3, 2], [0, 1]])
    x = torch.randn(5, experts.hidden_size, dtype=torch.float64, requires_grad=True)
    out = experts(x, ids, torch.full(ids.shape, 0.5, dtype=torch.float64))
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    per_row = 2 * experts.gate_up_proj[0].numel() + 2 * experts.down_proj[0].numel()
    rows = sum(int((ids == i).sum()) for i in trained)
    width = experts.gate_up_proj_bias.shape[1] + experts.down_proj_bias.shape[1]
    biases = 2 * ids.numel() * experts.num_experts * width
    assert counter.get_total_flops() == (ids.numel() + rows) * per_row + biases


def test_what_is_saved_loads_into_whole_models(tmp_path):
    model = make_model(Run())
    SparseUpdate(experts={0: [1]}).apply(model)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.trained.down_proj += 1
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        other = make_model(Run())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert read.keys() == make_model(Run()).state_dict().keys()
    for key, value in read.items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_selects_by_what_the_model_chooses():
    model = make_model(Run("olmoe"))
    batches = [{"input_ids": torch.arange(3, 24).view(3, 7)}]
    chosen = select_experts(model, batches, share=0.5)
    assert list(chosen) == [name for name, _ in expert_layers(model)]
    SparseUpdate(experts=chosen).apply(model)
    model(**batches[0], use_cache=False).logits.sum().backward()


def test_adapters_are_refused():
    model = make_model(Run())
    add_lora(model, 2)
    with pytest.raises(ConfigError, match=r"have adapters\. Train adapters or single experts"):
        SparseUpdate(experts=[0]).apply(model)
    model = make_model(Run())
    SparseUpdate(experts=[0]).apply(model)
    with pytest.raises(ConfigError, match="single experts"):
        add_lora(model, 2)


def test_other_implementations_would_train_nothing_and_are_refused():
    model, ids = make_model(Run()), torch.arange(3, 10)[None]
    SparseUpdate(experts=[0]).apply(model)
    model.set_experts_implementation("eager")
    with pytest.raises(ConfigError, match=r"has single experts that are trained, which .*'eager'"):
        model(ids)
    SparseUpdate.release(model)
    released = model(ids).logits
    model.set_experts_implementation("fastmoe")
    torch.testing.assert_close(model(ids).logits, released)
