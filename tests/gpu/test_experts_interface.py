"""transformers' experts by this package's kernels: close to their own, and the host never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.closeness import host_never_waits

import lightning_fastmoe.huggingface  # noqa: F401  registers them

experts_classes = pytest.importorskip("huggingface.experts_classes")

NAMES = ["Qwen3MoeExperts", "Gemma4TextExperts", "GptOssExperts", "NemotronHExperts"]
WIDTHS = {"d_model": 128, "d_ffn": 64}


def make(name: str, dtype: torch.dtype, tokens: int = 300) -> tuple[Any, Any]:
    torch.manual_seed(0)
    kind = experts_classes.experts_classes()[name]
    experts = experts_classes.make_experts(kind, **WIDTHS)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.mul_(0.3)
    x, ids, weights = experts_classes.make_inputs(tokens=tokens, d_model=WIDTHS["d_model"])
    experts = experts.to("cuda", dtype)
    return experts, (x.to("cuda", dtype), ids.cuda(), weights.to("cuda", dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_close_to_transformers(name: str, dtype: torch.dtype) -> None:
    """No further from fp64 than transformers' own forward, but for a rounding."""
    experts, inputs = make(name, dtype)
    ours = experts_classes.results(experts, "fastmoe", inputs)
    theirs = experts_classes.results(experts, "eager", inputs)
    exact = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    wanted = experts_classes.results(experts.double(), "eager", exact)
    for key, value in wanted.items():
        error, eager = (
            float((found[key].double() - value).norm() / value.norm()) for found in (ours, theirs)
        )
        assert error < 1.5 * eager + max(torch.finfo(dtype).eps / 2, 1e-6), (key, error, eager)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_dropped", [False, True])
def test_the_host_never_waits(name: str, with_dropped: bool) -> None:
    """In bf16, forward and backward, also with dropped slots, which add nothing."""
    experts, (x, ids, weights) = make(name, torch.bfloat16)
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    if with_dropped:
        dropped[::3], dropped[1::3, 0] = True, True
    given = ids.masked_fill(dropped, experts.num_experts)
    experts(x, given, weights).float().mean().backward()  # compiles, allocates
    experts.zero_grad()
    with host_never_waits():
        out = experts(x, given, weights)
        out.float().square().mean().backward()
    grads = {key: parameter.grad.clone() for key, parameter in experts.named_parameters()}
    experts.zero_grad()
    wanted = experts(x, ids, weights.masked_fill(dropped, 0))
    wanted.float().square().mean().backward()
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=1e-3)
    for key, parameter in experts.named_parameters():
        error = (grads[key].double() - parameter.grad.double()).norm()
        assert error <= 1e-2 * parameter.grad.double().norm(), key
    assert not with_dropped or not out[::3].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-2), (torch.float32, 2e-5)])
def test_compiled(name: str, dtype: torch.dtype, bound: float) -> None:
    """As one graph: what runs there in place of kernels has their results and gradients."""
    torch._dynamo.reset()
    experts, inputs = make(name, dtype)
    wanted = experts_classes.results(experts, "fastmoe", inputs)
    experts.compile(fullgraph=True)
    found = experts_classes.results(experts, "fastmoe", inputs)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = float((found[key].double() - value.double()).norm() / value.double().norm())
        assert error < bound, (key, error)
