from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.ops import ACTIVATIONS, apply_activation, is_gated, reference
from lightning_fastmoe.ops.activation import COMPOSED, GATED, PLAIN

NAMES = (*ACTIVATIONS, *COMPOSED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_equals_reference(name, rows):
    torch.manual_seed(0)
    h = torch.randn(rows, 10, dtype=torch.float64) * 3
    got = apply_activation(h, name)
    assert got.shape == (rows, 5 if is_gated(name) else 10)
    torch.testing.assert_close(got, reference.activation(h, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_passes_gradcheck(name):
    torch.manual_seed(0)
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: apply_activation(z, name), h)


def test_the_gate_is_the_first_half():
    h = torch.tensor([[-1.0, 2.0, 10.0, 100.0]])
    assert apply_activation(h, "reglu").tolist() == [[0.0, 200.0]]


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu", "clamped_swiglu"])
def test_these_are_gated(name):
    assert is_gated(name)


def test_the_kernels_have_the_activations_of_the_table():
    source = (Path(__file__).parents[2] / "csrc/activations.cuh").read_text(encoding="utf-8")
    table = dict(re.findall(r'name == "(\w+)"\) return function\(Activation<(\w+), ', source))
    assert sorted(table) == sorted(ACTIVATIONS)
    for gated, plain in GATED.items():
        assert table[gated] == table[plain]


@pytest.mark.parametrize("call", [is_gated, lambda name: apply_activation(torch.ones(1, 2), name)])
def test_unknown_name_lists_the_known(call):
    with pytest.raises(ConfigError, match=f"'tanh'.*one of: {', '.join(NAMES)}"):
        call("tanh")


def test_the_reference_knows_no_other_name():
    with pytest.raises(NotImplementedError, match="'tanh'"):
        reference.activation(torch.ones(1, 2), "tanh")


@pytest.mark.parametrize("name", PLAIN)
def test_the_gradient_that_the_layer_uses_is_the_derivative(name):
    x = torch.linspace(-4, 4, 10, dtype=torch.float64, requires_grad=True)
    upstream = torch.arange(1.0, 11, dtype=torch.float64)
    (want,) = torch.autograd.grad(reference.activation(x, name), x, upstream)
    got = PLAIN[name].backward(upstream, x.detach())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
