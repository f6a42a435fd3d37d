from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.nn import MoE


@pytest.fixture
def _deterministic():
    """Refuses operations without a deterministic twin; C++ also fills fresh memory with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(width, dtype):
    torch.manual_seed(0)
    layer = MoE(width, 2 * width, 6, 3, bias=True).to(dtype)
    x = torch.randn(3, 37, width).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_deterministic")
def test_two_runs_give_the_same_bits(width, dtype):
    first, second = run(width, dtype), run(width, dtype)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert a.any()
        assert torch.equal(a, b)


@pytest.mark.usefixtures("_deterministic")
def test_the_mode_that_this_relies_on_is_on():
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.zeros(2).resize_(100)[50:].isnan().all()


@pytest.mark.parametrize("width", [8, 7])
def test_a_token_alone_equals_the_token_in_a_batch(width):
    """Dropless: what a token gets does not depend on its neighbours."""
    torch.manual_seed(0)
    layer = MoE(width, 2 * width, 6, 3, bias=True).double()
    x = torch.randn(11, width, dtype=torch.float64)
    together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer(x.flip(0)).flip(0), together, rtol=1e-12, atol=1e-14)
