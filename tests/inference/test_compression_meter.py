"""What compression would change, against a model with the rounded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.compressed_models import ROUNDED, rounded
from inference.offload_models import D_MODEL, KINDS, Blocks
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import compression_error, offload_experts
from lightning_fastmoe.inference.compression_meter import CompressionMeter
from lightning_fastmoe.nn.expert_layers import expert_layers

pytestmark = pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")


def relative(exact: list[Tensor], other: list[Tensor]) -> float:
    """The norm of all differences over that of all exact values."""
    a, b = (torch.cat([t.flatten() for t in tensors]).double() for tensors in (exact, other))
    return float((a - b).norm() / a.norm())


def outputs(model: Blocks, batches: list[Tensor]) -> list[list[Tensor]]:
    """Of each layer's experts in a pass."""
    found: list[list[Tensor]] = [[] for _ in model.layers]
    hooks = [
        layer.experts.register_forward_hook(lambda _, __, out, n=n: found[n].append(out))
        for n, layer in enumerate(model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("compression", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["softmax", "bias", "modules"])
@pytest.mark.parametrize("is_offloaded", [True, False])
def test_errors_of_layers_and_output(kind: str, compression: str, is_offloaded: bool) -> None:
    model = Blocks(KINDS[kind]).train()
    right = rounded(model, compression)
    exact = copy.deepcopy(model)
    batches = [torch.randn(n, D_MODEL) for n in (12, 5)]
    if is_offloaded:
        offloaded = offload_experts(model, "cpu")
    errors = compression_error(model, batches, compression)
    if is_offloaded:
        offloaded.close()
    with torch.no_grad():
        wanted = relative([exact(x) for x in batches], [right(x) for x in batches])
    assert errors.output == pytest.approx(wanted, rel=1e-3)
    assert 1e-4 < wanted < 0.3
    of_layers = outputs(exact, batches)
    for number, found in enumerate(of_layers):
        one = copy.deepcopy(exact)  # with this layer rounded, the inputs up to here are exact
        one.layers[number] = right.layers[number]
        error = errors.layers[f"layers.{number}"]
        assert error == pytest.approx(relative(found, outputs(one, batches)[number]), rel=1e-3)
    for (name, a), b in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert model.training
    assert not any(part._forward_hooks for part in model.modules())
    assert errors.text().splitlines()[-1] == f"the model's output  {errors.output:.2e}"


def test_what_is_compared() -> None:
    """Logits of what transformers return, or what ``run`` says."""
    model = Blocks({}).eval()
    x = torch.randn(5, D_MODEL)
    plain = compression_error(model, [x], "int8").output
    wrapped = nn.Module()
    wrapped.inner = model
    wrapped.forward = lambda ids: SimpleNamespace(logits=model(ids))  # type: ignore[method-assign]
    assert compression_error(wrapped, [{"ids": x}], "int8").output == plain
    with torch.inference_mode():
        assert compression_error(model, [x], "int8").output == plain
    loss = compression_error(model, [x], "int4", run=lambda batch: model(batch).square().mean())
    with torch.no_grad():
        a, b = (m(x).square().mean() for m in (model, rounded(model, "int4")))
    assert loss.output == pytest.approx(float((a - b).abs() / a), rel=1e-3)


@pytest.mark.poisoned(False)  # dynamo knows torch.empty by identity
@pytest.mark.parametrize("is_traced_before", [True, False])
def test_layers_inside_a_compiled_graph(is_traced_before: bool) -> None:
    """A graph that has the layers inside calls no hooks, and one with hooks can't be made."""
    model = Blocks({}).eval()
    x = torch.randn(5, D_MODEL)
    plain = compression_error(model, [x], "int4")
    compiled = copy.deepcopy(model)
    calls = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*args: object) -> object:
            nonlocal calls
            calls += 1
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    compiled.compile(backend=backend, fullgraph=True)
    if is_traced_before:
        compiled(x)
    assert compression_error(compiled, [x], "int4") == plain
    assert calls == is_traced_before
    compiled(x)
    assert calls == is_traced_before + 1, "it runs in its graph again"


def test_observers_of_transformers_layers_see_each_token_once() -> None:
    model = make_model(Run("qwen3_moe")).eval()
    seen: list[int] = []
    for _, layer in expert_layers(model):
        layer.register_routing_observer(lambda _, routing: seen.append(len(routing.expert_ids)))
    ids = torch.arange(3, 20).repeat(2, 1)
    with torch.no_grad():
        model(ids)
    once = list(seen)
    meter = CompressionMeter(model, "int8")
    with torch.no_grad():
        model(ids)
        assert seen == 2 * once
        meter.close()
        model(ids)
    assert seen == 3 * once
    assert all(1e-4 < error < 0.1 for error in meter.errors().layers.values())


def test_a_layer_without_tokens_has_no_error() -> None:
    model = Blocks({}, order=(0, 2)).eval()
    errors = compression_error(model, [torch.randn(5, D_MODEL)], "int8")
    assert [name for name, error in errors.layers.items() if error == error] == [
        "layers.0",
        "layers.2",
    ]


def test_what_can_not_be_measured() -> None:
    model, x = Blocks({}).eval(), torch.randn(3, D_MODEL)
    with pytest.raises(ConfigError, match="got no batches"):
        compression_error(model, [], "int8")
    with pytest.raises(ConfigError, match="returned a str, which can't be compared: pass run="):
        compression_error(model, [x], "int8", run=lambda _: "text")  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="compression='int2' is unknown"):
        compression_error(model, [x], "int2")
    with pytest.raises(ConfigError, match="Linear has no experts that could be compressed"):
        compression_error(nn.Linear(2, 2), [x], "int8")
    offload_experts(model, "cpu", compression="int8")
    with pytest.raises(ConfigError, match=r"layers.0 are compressed, and what they were is gone"):
        compression_error(model, [x], "int8")
