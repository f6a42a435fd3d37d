"""The language model: what it may see, what its optimizer does, and what it samples."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_fastmoe.demos.byte_lm import MoELanguageModel, SampleText, generate
from lightning_fastmoe.demos.byte_lm.model import _describe
from lightning_fastmoe.demos.optimization import decay_groups
from lightning_fastmoe.errors import ConfigError


def _model(**arguments: object) -> MoELanguageModel:
    torch.manual_seed(0)
    shape = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ffn": 8, "num_experts": 4}
    model = MoELanguageModel(**{**shape, "init_std": 0.2, **arguments})
    model.configure_model()
    return model


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).byte()


def test_logits_have_a_value_per_byte() -> None:
    assert _model()(_bytes(3, 10)).shape == (3, 10, 256)


def test_network_is_built_once() -> None:
    model = _model()
    network = model.network
    model.configure_model()
    assert model.network is network


def test_compiled_blocks_compute_the_same_under_the_same_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[torch.nn.Module] = []
    plain_compile = torch.nn.Module.compile

    def compile_by_dynamo_alone(module: torch.nn.Module) -> None:
        compiled.append(module)
        plain_compile(module, backend="eager")  # as inductor takes half a minute

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by_dynamo_alone)
    plain, model = _model(), _model(compile=True)
    model.configure_model()
    assert model.network is not None
    assert compiled == list(model.network.blocks), "once each"
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens = _bytes(2, 8)
    counters.clear()
    torch.testing.assert_close(model(tokens), plain(tokens))
    assert counters["stats"]["unique_graphs"] == 1, "all blocks share a graph"
    assert not counters["graph_break"]


def test_forward_before_configure_model_says_what_to_call() -> None:
    with pytest.raises(ConfigError, match="configure_model"):
        MoELanguageModel()(_bytes(1, 4))


def test_model_is_causal() -> None:
    model = _model().eval()
    tokens = _bytes(2, 12)
    changed = tokens.clone()
    changed[:, 7] ^= 1
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    # Not vacuous: the changed byte is seen from its own place on.
    assert ((after - before)[:, 7:].abs().amax(dim=(0, 2)) > 1e-4).all()


def test_model_sees_the_order_of_bytes() -> None:
    model = _model().eval()
    tokens = torch.tensor([[1, 2, 3, 9]])
    swapped = torch.tensor([[2, 1, 3, 9]])
    assert (model(tokens)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4


def test_loss_is_cross_entropy_of_the_next_byte() -> None:
    model = _model().eval()
    windows = _bytes(2, 9)
    logits = model(windows[:, :-1])
    expected = [
        F.cross_entropy(logits[b], windows[b, 1:].long(), reduction="none") for b in range(2)
    ]
    torch.testing.assert_close(model._nats_per_byte(windows), torch.stack(expected))
    torch.testing.assert_close(
        model.predict_step(windows, 0), torch.stack(expected).mean(dim=1) / math.log(2)
    )


def test_matrices_decay_and_embeddings_and_norms_do_not() -> None:
    model = _model()
    decay, no_decay = decay_groups(model, 0.3)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    kept = {names[id(p)] for p in no_decay["params"]}
    assert decayed.isdisjoint(kept)
    assert decayed | kept == set(names.values())
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert kept == {name for name in names.values() if "norm" in name or "embedding" in name}
    assert any("experts" in name for name in decayed)


def test_heads_that_do_not_divide_the_width_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"d_model is 18 and .*num_heads is 4"):
        MoELanguageModel(d_model=18, num_heads=4)


def _counting_model(calls: list[Tensor]) -> object:
    def model(tokens: Tensor) -> Tensor:
        """Certain that each byte is followed by the next value."""
        calls.append(tokens)
        return 50.0 * F.one_hot((tokens.long() + 1) % 256, 256).float()

    return model


def test_generate_continues_past_the_context() -> None:
    calls: list[Tensor] = []
    text = generate(_counting_model(calls), b"\x0a\x0b", 12, context=8)
    assert list(text) == list(range(12, 24))
    assert {tuple(call.shape) for call in calls} == {(1, 8)}
    assert calls[0].tolist() == [[10, 11, 0, 0, 0, 0, 0, 0]]
    assert calls[-1].tolist() == [list(range(15, 23))]


def test_generate_draws_by_its_seed_alone() -> None:
    def uniform(tokens: Tensor) -> Tensor:
        return torch.zeros(1, tokens.shape[1], 256)

    state = torch.get_rng_state()
    first = generate(uniform, b"x", 20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert generate(uniform, b"x", 20, seed=1) == first
    assert generate(uniform, b"x", 20, seed=2) != first


def test_cold_sampling_takes_the_likeliest() -> None:
    def model(tokens: Tensor) -> Tensor:
        return torch.linspace(0, 1, 256).expand(1, tokens.shape[1], 256)

    assert generate(model, b"x", 5, temperature=1e-4) == b"\xff" * 5


@pytest.mark.parametrize(
    ("prompt", "temperature", "match"), [(b"", 1.0, "prompt is empty"), (b"x", 0.0, "temperature")]
)
def test_generate_refuses_what_it_cannot_do(prompt: bytes, temperature: float, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        generate(_counting_model([]), prompt, 1, temperature=temperature)


@pytest.mark.parametrize(
    ("router", "arguments", "used"),
    [
        ("softmax", {}, "2.76 M"),
        ("expert_choice", {"top_k": None, "moe": {"capacity_factor": 1.5}}, "2.37 M"),
        ("soft", {"top_k": None}, "7.48 M"),  # its slots mix every byte into every expert
    ],
)
@pytest.mark.filterwarnings("ignore::lightning_fastmoe.nn.CausalityWarning")
def test_the_line_about_its_size(router: str, arguments: dict[str, Any], used: str) -> None:
    model = MoELanguageModel(router=router, **arguments)
    model.configure_model()
    assert model.network is not None
    assert _describe(model.network) == (
        f"Model: 7.48 M parameters, {used} used per byte; "
        "4 layers of 8 experts, 8 of them on each rank."
    )


def test_text_is_sampled_without_compiling_for_its_shape() -> None:
    graphs = []

    def counting(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    model = _model()
    model.network.blocks[0].compile(backend=counting)
    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(forward_context=nullcontext), is_global_zero=False
    )
    SampleText(num_bytes=2, context=4).on_train_end(trainer, model)
    assert not graphs
    model(_bytes(2, 8))
    assert graphs, "it is compiled all the same"
