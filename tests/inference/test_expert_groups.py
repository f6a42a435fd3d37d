"""Layers whose experts visit the device in groups, against layers as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.offload_models import D_MODEL, KINDS, Blocks, poisoned

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts

SIZES = {"num_experts": 7, "top_k": 2}
MORE_KINDS: dict[str, dict[str, Any]] = {
    **{kind: options for kind, options in KINDS.items() if kind not in ("modules", "few")},
    "soft": {"router": "soft", "top_k": None},
    "composed": {"activation": "clamped_swiglu"},
    "dropping": {"capacity_factor": 1.0},
    "one group idle": {"top_k": 1},
}


@pytest.mark.parametrize(("groups", "slots"), [(2, 1), (2, 2), (3, 4), (7, 2)])
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_close_to_whole_layers(kind: str, groups: int, slots: int) -> None:
    """Rows are those of whole layers; sums over a token's experts may round otherwise."""
    model = Blocks({**SIZES, **MORE_KINDS[kind]}).eval()
    batches = [torch.randn(n, D_MODEL) for n in (12, 1, 5, 0, 1, 12, 12)]
    twin = copy.deepcopy(model).double()
    with torch.inference_mode():
        expected = [model(batch) for batch in batches]
        exact = [twin(batch.double()) for batch in batches]
        offloaded = offload_experts(model, "cpu", slots=slots, groups=groups)
        poisoned(offloaded._ring)
        for _ in range(2):
            for batch, right, best in zip(batches, expected, exact, strict=True):
                found = model(batch)
                torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
                error = (found - best).abs().amax() if len(batch) else torch.tensor(0.0)
                assert error <= 2e-6
    assert offloaded.statistics.misses == 0
    assert 4 * offloaded.host_bytes > offloaded.slot_bytes > 0
    offloaded.close()
    with torch.no_grad():
        assert torch.equal(model(batches[0]), expected[0])
        assert offloaded.statistics.misses == 0


@pytest.mark.parametrize("groups", [2, 4])
def test_sums_are_rounded_once(groups: int) -> None:
    """Each token has an expert in each group: rounding each group's sum to bf16 would show."""
    model = Blocks({"num_experts": 4, "top_k": 4}, (0,), 1).eval().bfloat16()
    x = torch.randn(200, D_MODEL).bfloat16()
    with torch.inference_mode():
        expected = model(x)
        offload_experts(model, "cpu", groups=groups)
        assert torch.equal(model(x), expected)


def test_a_slot_holds_a_group() -> None:
    model = Blocks({"num_experts": 8}).eval()
    x = torch.randn(30, D_MODEL)
    offloaded = offload_experts(model, "cpu", slots=2, groups=4)
    layer = offloaded.host_bytes // 4
    assert offloaded.slot_bytes == 2 * layer // 4
    before = offloaded.statistics.copied
    with torch.inference_mode():
        model(x)
    assert offloaded.statistics.copied - before == 4 * layer


@pytest.mark.parametrize("cache", [None, "20KB"])
def test_few_tokens_copy_what_they_chose(cache: str | None) -> None:
    model = Blocks({"num_experts": 8}).eval()
    size = 8 * 3 * D_MODEL * 4
    step = torch.randn(1, D_MODEL)
    with torch.inference_mode():
        expected = model(step)
        offloaded = offload_experts(model, "cpu", slots=1, groups=2, expert_cache=cache)
        poisoned(offloaded._ring)
        model(step)
        before = offloaded.statistics.copied
        torch.testing.assert_close(model(step), expected, rtol=1e-6, atol=1e-6)
    assert offloaded.statistics.copied - before == (4 * 2 * size if cache is None else 0)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral", "nemotron_h"])
def test_models_of_transformers(name: str) -> None:
    model = make_model(Run(name)).eval()
    ids = torch.arange(3, 20).repeat(2, 1)
    with torch.inference_mode():
        expected = [model(part).logits for part in (ids, ids[:1, :1], ids)]
        offloaded = offload_experts(model, "cpu", slots=1, groups=2)
        poisoned(offloaded._ring)
        for part, right in zip((ids, ids[:1, :1], ids), expected, strict=True):
            torch.testing.assert_close(model(part).logits, right, rtol=1e-5, atol=1e-5)


def test_experts_of_transformers_with_dropped_slots() -> None:
    """Some pairs have no row then."""
    model = make_model(Run("qwen3_moe")).eval()
    experts: Any = model.model.layers[0].mlp.experts
    chosen = torch.tensor([[5, 8, 2], [8, 8, 8], [0, 1, 8]])
    args = (torch.randn(3, 16), chosen, torch.rand(3, 3))
    with torch.inference_mode():
        expected = experts(*args)
        offload_experts(model, "cpu", groups=2)
        torch.testing.assert_close(experts(*args), expected, rtol=1e-5, atol=1e-6)
        model.set_experts_implementation("eager")
        with pytest.raises(ConfigError, match="is not computed in groups of experts: use"):
            experts(*args)


def test_copies_are_ordinary_and_changed_weights_are_used() -> None:
    model, other = Blocks(SIZES).eval(), Blocks(SIZES).eval()
    x = torch.randn(9, D_MODEL)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
        expected = other(x)
    offloaded = offload_experts(model, "cpu", groups=2)
    twin = copy.deepcopy(model)
    before = offloaded.statistics.copied
    twin(x).sum().backward()
    assert offloaded.statistics.copied == before
    with pytest.raises(ConfigError, match="so it can't be trained"):
        model(x)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    offloaded.close()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_an_interrupted_group_leaves_the_ring_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = Blocks(SIZES).eval()
    x = torch.randn(9, D_MODEL)
    with torch.inference_mode():
        expected = model(x)
        offloaded = offload_experts(model, "cpu", groups=2)
        poisoned(offloaded._ring)
        with monkeypatch.context() as patch:
            patch.setattr(model.layers[2].experts, "_compute", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="groups=0 must be between 1 and the 4 experts"):
        offload_experts(Blocks({}), "cpu", groups=0)
    with pytest.raises(ConfigError, match="groups=5 must be between 1 and the 4 experts"):
        offload_experts(Blocks({}), "cpu", groups=5)
    with pytest.raises(ConfigError, match="groups=2 divides stacks .* ModuleExperts are modules"):
        offload_experts(Blocks(KINDS["modules"]), "cpu", groups=2)


@pytest.mark.parametrize("groups", [1, 2])
def test_replaced_parameters_are_refused(groups: int) -> None:
    model, other = Blocks(SIZES).eval(), Blocks(SIZES).eval()
    x = torch.randn(9, D_MODEL)
    offloaded = offload_experts(model, "cpu", groups=groups)
    model.load_state_dict(other.state_dict(), assign=True)
    with torch.no_grad():
        with pytest.raises(ConfigError, match="moved, converted or replaced since"):
            model(x)
        offloaded.close()
        expected = other(x)
        assert torch.equal(model(x), expected)
