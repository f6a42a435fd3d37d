from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_fastmoe.errors import (
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnmanagedExpertsError,
)
from lightning_fastmoe.nn import MoE, SoftmaxTopKRouter, dispatch, moe_layers, moe_losses
from lightning_fastmoe.nn.nonfinite import begin_micro_batch, take_largest
from lightning_fastmoe.ops import ACTIVATIONS, reference
from lightning_fastmoe.ops.activation import COMPOSED


def make(d_model=5, d_ffn=3, num_experts=4, top_k=2, **kwargs):
    """A layer without attached losses and, where it has biases, with biases that matter."""
    torch.manual_seed(0)
    layer = MoE(d_model, d_ffn, num_experts, top_k, **{"load_balancing": 0, "z_loss": 0, **kwargs})
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def by_reference(layer, x, routing):
    e = layer.experts
    return reference.moe(
        x,
        routing.weights,
        routing.expert_ids,
        e.up_proj,
        e.down_proj,
        e.activation,
        e.up_bias,
        e.down_bias,
    )


@pytest.mark.parametrize(
    ("tokens", "width", "inner", "experts", "k"),
    [(1, 1, 1, 1, 1), (7, 5, 3, 4, 1), (11, 3, 5, 7, 2), (6, 4, 4, 3, 3), (3, 4, 2, 17, 2)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_reference(tokens, width, inner, experts, k, bias):
    layer = make(width, inner, experts, k, bias=bias).double()
    assert_equals_reference(layer, tokens)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *COMPOSED])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_reference_with_each_activation(activation, bias):
    assert_equals_reference(make(activation=activation, bias=bias).double(), 9)


@pytest.mark.parametrize("normalize", [False, True])
def test_equals_reference_normalised_or_not(normalize):
    assert_equals_reference(make(normalize_weights=normalize).double(), 9)


def assert_equals_reference(layer, tokens):
    x = torch.randn(tokens, layer.d_model, dtype=torch.float64, requires_grad=True)
    got, want = layer(x), by_reference(layer, x, layer.router(x))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    leaves, upstream = (x, *layer.parameters()), torch.randn_like(got)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    want_grads = torch.autograd.grad(want, leaves, upstream)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_layer_passes_gradcheck():
    layer = make(3, 2, 4, 2, bias=True).double()
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("width", [16, 5])
@pytest.mark.parametrize("mode", ["bf16 weights", "autocast", "autocast, bf16 input"])
def test_bf16(width, mode):
    """Widths 16 and 5: grouped_mm and the loop."""
    layer = make(width, 2 * width, 4, 2, bias=True)
    x = torch.randn(33, width)
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    if mode == "bf16 weights":
        layer.bfloat16()
    if mode != "autocast":
        x = x.bfloat16()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode != "bf16 weights"):
        got = layer(x)
    assert got.dtype == x.dtype
    (routing,) = seen
    assert {t.dtype for t in routing[:3]} == {torch.float32}

    exact = copy.deepcopy(layer).double()
    high = x.detach().double().requires_grad_()
    routing = exact.router(high)
    assert torch.equal(routing.expert_ids, seen[0].expert_ids)
    want = by_reference(exact, high, routing)
    upstream = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, (x, *layer.parameters()), upstream)
    want_grads = torch.autograd.grad(want, (high, *exact.parameters()), upstream.double())
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert 0 < error < 1e-2
    for leaf, grad in zip((x, *layer.parameters()), got_grads, strict=True):
        assert grad.dtype == leaf.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(dtype, weights):
    assert make().to(weights)(torch.randn(3, 5).to(dtype)).dtype == dtype


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5), (2, 1, 3, 5), (2, 0, 5)])
def test_leading_dimensions_are_tokens(shape):
    layer, x = make(), torch.randn(shape)
    got = layer(x)
    assert got.shape == shape
    assert torch.equal(got.reshape(-1, 5), layer(x.reshape(-1, 5)))


def test_input_of_any_layout():
    layer, x = make(), torch.randn(5, 3, 2)
    assert torch.equal(layer(x.permute(2, 1, 0)), layer(x.permute(2, 1, 0).contiguous()))
    one = torch.randn(1, 5)
    torch.testing.assert_close(layer(one.expand(4, 5)), layer(one).expand(4, 5))


@pytest.mark.parametrize("width", [8, 5])
def test_no_tokens_give_zero_gradients(width):
    layer = make(width, 2 * width, bias=True, load_balancing=0.1, z_loss=0.1)
    x = torch.zeros(0, width, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, width)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("width", [8, 5])
def test_experts_without_tokens_get_zero_gradients(width):
    layer = make(width, 8, 6, 1, bias=True)
    with torch.no_grad():
        layer.router.weight.zero_()  # all scores are equal: expert 0 gets everything
    layer(torch.randn(4, width)).square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert not parameter.grad[1:].any()


def test_frozen_experts_still_train_the_router():
    layer, x = make(), torch.randn(7, 5)
    layer(x).square().sum().backward()
    want = layer.router.weight.grad.clone()
    layer.zero_grad()
    layer.experts.requires_grad_(False)
    layer(x).square().sum().backward()
    assert torch.equal(layer.router.weight.grad, want)
    assert all(p.grad is None for p in layer.experts.parameters())


def test_a_router_of_ones_own():
    torch.manual_seed(0)
    router = SoftmaxTopKRouter(5, 4, top_k=3, normalize_weights=False)
    assert_equals_reference(make(top_k=None, router=router).double(), 7)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' is unknown.*swiglu"),
        ({"router": "magic"}, "router='magic'.*softmax"),
        ({"dispatcher": "magic"}, "dispatcher='magic'.*auto, local, all_to_all"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"d_model": -1}, "d_model=-1"),
        ({"d_ffn": 2.5}, "d_ffn=2.5"),
        ({"top_k": 2.0}, "top_k=2.0"),
    ],
)
def test_refused_arguments(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make(**kwargs)


@pytest.mark.parametrize("name", ["load_balancing", "z_loss"])
@pytest.mark.parametrize("value", [-0.01, float("nan"), float("inf")])
def test_refused_coefficients(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} is invalid"):
        make(**{name: value})


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 4),
        torch.zeros(5, 3),
        torch.zeros(()),
        torch.zeros(3, 5, dtype=torch.long),
        torch.zeros(3, 5, dtype=torch.bool),
        torch.zeros(3, 5, dtype=torch.complex64),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.dtype}",
)
def test_refused_inputs(x):
    if x.is_floating_point():
        named = [str(tuple(x.shape)), "d_model=5"]
    else:  # of which the shape is right
        named = [str(x.dtype), "through an embedding"]
    with pytest.raises(ShapeError) as error:
        make()(x)
    assert [what for what in named if what not in str(error.value)] == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_input_raises(bad, training):
    layer, x = make().train(training), torch.randn(7, 5)
    x[6, 4] = bad
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        layer(x)


def test_non_finite_router_weight_raises():
    layer = make()
    layer.router.weight.data[3, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        layer(torch.randn(7, 5))


def test_non_finite_input_can_be_let_pass():
    layer, x = make(), torch.randn(7, 5)
    clean = layer(x)
    layer.nonfinite_policy = "ignore"
    x[2, 1] = float("nan")
    y = layer(x)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(y[keep], clean[keep])


def test_non_finite_input_can_be_collected():
    layer, x = make(), torch.randn(7, 5)
    layer.nonfinite_policy = "collect"
    layer(x)
    assert not layer.nonfinite.found
    x[2, 1] = float("nan")
    layer(x)
    layer(torch.randn(7, 5))  # a good pass does not hide the bad one
    assert not math.isfinite(float(take_largest([layer.nonfinite], x.device)))
    layer.eval()(x)
    assert float(take_largest([layer.nonfinite], x.device)) == 0


def test_what_micro_batches_collect_is_kept_until_the_step() -> None:
    """And each begins with the same tensor, whose memory CUDA graphs know."""
    layers = [make(), make()]
    x = torch.randn(7, 5)
    bad = x.index_fill(0, torch.tensor([2]), float("nan"))
    guards = [layer.nonfinite for layer in layers]
    for guard in guards:
        guard.begin(x.device, collects=True)
    begins = [guard._largest for guard in guards]
    for inputs in ((x, x), (x, bad), (x, x)):
        begin_micro_batch(guards)
        assert all(guard._largest is begin for guard, begin in zip(guards, begins, strict=True))
        for layer, own in zip(layers, inputs, strict=True):
            layer(own)
    assert [guard.found for guard in guards] == [False, True]
    largest = take_largest(guards, x.device)
    torch.testing.assert_close(largest[0], (x @ layers[0].router.weight.T).abs().max())
    assert largest[1].isnan()
    begin_micro_batch(guards)
    assert (take_largest(guards, x.device) == 0).all()
    guards[0].put()
    layers[0](x)
    begin_micro_batch(guards)
    assert take_largest(guards, x.device).tolist() == [float("inf"), 0]


def test_experts_elsewhere_need_a_strategy():
    layer = make()
    layer.experts.keep((0, 1))
    with pytest.raises(UnmanagedExpertsError, match="2 of 4 experts"):
        layer(torch.randn(3, 5))


@pytest.mark.parametrize("name", ["all_to_all", "by_pigeon"])
def test_a_dispatcher_that_needs_other_ranks_needs_a_strategy(monkeypatch, name):
    monkeypatch.setattr(dispatch, "DISPATCHERS", (*dispatch.DISPATCHERS, "by_pigeon"))
    with pytest.raises(UnmanagedExpertsError, match=f"dispatcher='{name}' exchanges tokens"):
        make(dispatcher=name)(torch.randn(3, 5))


@pytest.mark.parametrize("training", [True, False])
def test_observers_see_each_pass_until_removed(training):
    layer, x, seen = make().train(training), torch.randn(7, 5), []
    handle = layer.register_routing_observer(
        lambda observed, routing: seen.append((observed, routing, torch.is_grad_enabled()))
    )
    layer(x)
    layer(x)
    handle.remove()
    layer(x)
    assert len(seen) == 2
    for observed, routing, grad in seen:
        assert observed is layer
        assert not grad
        assert torch.equal(routing.expert_ids, layer.router(x).expert_ids)


def test_a_handle_removes_its_own_observer_alone():
    layer, seen = make(), []
    first = layer.register_routing_observer(lambda *_: seen.append(1))
    first.remove()
    layer.register_routing_observer(lambda *_: seen.append(2))
    first.remove()
    layer(torch.randn(3, 5))
    assert seen == [2]


def test_moe_layers_finds_all_with_names():
    model = nn.ModuleDict({"a": make(), "b": nn.Sequential(nn.Linear(5, 5), make())})
    assert [name for name, _ in moe_layers(model)] == ["a", "b.1"]
    assert [name for name, _ in moe_layers(model["a"])] == [""]


def pickled(module):
    return pickle.loads(pickle.dumps(module))  # noqa: S301


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize("state", ["new", "used", "in use"])
def test_layers_can_be_copied_and_pickled(clone, state):
    layer, x = make(load_balancing=0.1), torch.randn(7, 5)
    y = None if state == "new" else layer(x)
    if state == "used":
        y.sum().backward()
        layer.zero_grad()
    other = clone(layer)
    assert moe_losses(other) == {}  # the graph belongs to the original
    assert bool(moe_losses(layer)) is (state == "in use")
    assert torch.equal(other(x), layer(x))
