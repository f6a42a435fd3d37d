"""Who computes a layer, and what forward and backward hand to each other."""

from __future__ import annotations

import pytest
import torch
from ops.slow_products import SlowOperators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fastmoe.ops import (
    choice,
    expert_layer,
    expert_loop,
    expert_mlp,
    native,
    order_by_expert,
    reference,
)
from lightning_fastmoe.ops.layer_call import LayerCall, PreActivation, Wanted
from lightning_fastmoe.ops.products import hopper as hopper_module
from lightning_fastmoe.ops.products import torch as torch_module
from lightning_fastmoe.ops.products.hopper import HopperProducts
from lightning_fastmoe.ops.products.torch import TorchProducts
from lightning_fastmoe.ops.steps import Steps
from lightning_fastmoe.ops.two_operators import TwoOperators

LOOP, TORCH, HOPPER = "expert_loop", "steps(torch)", "steps(hopper)"
WHOLE, WHOLE_HOPPER = "two operators(grouped_mm)", "two operators(hopper)"


def name_of(implementation: object) -> str:
    if implementation is expert_loop:
        return LOOP
    if isinstance(implementation, TwoOperators):
        return WHOLE_HOPPER if implementation.on_hopper else WHOLE
    assert isinstance(implementation, Steps)
    return HOPPER if isinstance(implementation.products, HopperProducts) else TORCH


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100, B200, A100 = (9, 0), (10, 0), (8, 0)
UP, DOWN, BOTH = (True, False), (False, True), (True, True)


def on_cpu(want, **given):
    return given | {"device": "cpu", "dtype": given.get("dtype", FP32)}, want


def on(capability, dtype, want, **given):
    return given | {"device": "cuda", "dtype": dtype, "capability": capability}, want


@pytest.mark.parametrize(
    ("given", "want"),
    [
        on_cpu(LOOP),
        on_cpu(LOOP, dtype=FP64),
        on_cpu(LOOP, dtype=BF16, width=5),
        on_cpu(LOOP, shift=1),
        on_cpu(LOOP, h_has_bias=True),
        on_cpu(TORCH, compiling=True),
        on_cpu(TORCH, tokens=0),
        on_cpu(TORCH, biases=UP),
        on_cpu(TORCH, biases=DOWN),
        on_cpu(TORCH, biases=BOTH, h_has_bias=True),
        on(H100, BF16, WHOLE_HOPPER),
        on(H100, FP16, WHOLE_HOPPER),
        on(H100, BF16, WHOLE_HOPPER, compiling=True),
        on(H100, BF16, WHOLE_HOPPER, h_has_bias=False),
        on(H100, BF16, WHOLE, own_products=False),
        on(H100, FP16, TORCH, own_products=False),
        on(H100, BF16, TORCH, kernels=False),
        on(H100, BF16, TORCH, tokens=0),
        on(H100, BF16, TORCH, shift=1),
        on(H100, BF16, TORCH, width=12),
        on(H100, FP32, TORCH),
        on(H100, BF16, HOPPER, biases=UP),
        on(H100, BF16, HOPPER, biases=DOWN),
        on(H100, FP16, HOPPER, biases=BOTH),
        on(H100, BF16, HOPPER, biases=BOTH, h_has_bias=True),
        on(H100, BF16, TORCH, biases=BOTH, h_has_bias=False),
        on(H100, BF16, TORCH, biases=BOTH, h_has_bias=True, shift=1),
        on(H100, BF16, TORCH, biases=BOTH, tokens=0),
        on(H100, BF16, TORCH, biases=BOTH, own_products=False),
        on(H100, FP32, TORCH, biases=BOTH),
        on(B200, BF16, WHOLE),
        on(B200, FP16, TORCH),
        on(B200, BF16, TORCH, biases=UP),
        on(A100, BF16, TORCH),
        on_cpu(LOOP, all_pairs=False),
        on(H100, BF16, WHOLE_HOPPER, all_pairs=False),
        on(H100, BF16, HOPPER, biases=UP, all_pairs=False),
        on(H100, BF16, TORCH, own_products=False, all_pairs=False),
        on(B200, BF16, TORCH, all_pairs=False),
        on(A100, FP16, TORCH, biases=BOTH),
    ],
    ids=str,
)
def test_products_are_chosen_by_device_dtype_width_and_address(monkeypatch, given, want):
    """Fake tensors say that they are on a GPU; ``shift`` is what ZeRO 3 does to an address."""
    kernels, own = given.get("kernels", True), given.get("own_products", True)
    library = type("Library", (), {"hopper_available": lambda self, device: own})()
    monkeypatch.setattr(native, "load", lambda: library if kernels else None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: given.get("compiling", False))
    for module in (hopper_module, torch_module):
        monkeypatch.setattr(module, "_capability", lambda device: given["capability"])
    tokens, width, shift = given.get("tokens", 4), given.get("width", 16), given.get("shift", 0)
    with FakeTensorMode():

        def tensor(*shape: int, dtype: torch.dtype = given["dtype"], shift: int = 0) -> Tensor:
            size = torch.Size(shape).numel()
            memory = torch.empty(shift + size, dtype=dtype, device=given["device"])
            return memory.narrow(0, shift, size).view(shape)

        rows = tensor(2 * tokens, dtype=torch.int64)
        biases = given.get("biases", (False, False))
        call = LayerCall(
            x=tensor(tokens, 16),
            weights=tensor(tokens, 2, dtype=FP32),
            up=tensor(3, 2 * width, 16, shift=shift),
            down=tensor(3, 16, width),
            up_bias=tensor(3, 2 * width) if biases[0] else None,
            down_bias=tensor(3, 16) if biases[1] else None,
            order=rows if given.get("all_pairs", True) else tensor(tokens, dtype=torch.int64),
            inverse=rows,
            tokens_per_expert=tensor(3, dtype=torch.int64),
            offsets=tensor(3, dtype=torch.int32),
            activation="swiglu",
        )
        has_bias = given.get("h_has_bias")
        h = None if has_bias is None else PreActivation(tensor(2 * tokens, 2 * width), has_bias)
        assert name_of(choice.choose(call, h)) == want


SLOW = SlowOperators()
IMPLEMENTATIONS = {
    LOOP: expert_loop,
    TORCH: Steps(TorchProducts()),
    HOPPER: Steps(HopperProducts(SLOW)),
    WHOLE_HOPPER: TwoOperators(SLOW, True),
}
WITHOUT_BIASES = list(IMPLEMENTATIONS)
WITH_BIASES = [TORCH, HOPPER]


@pytest.fixture(params=["tokens", "rows in expert order"])
def case(request: pytest.FixtureRequest):
    """Leaves (x, weights, up, down, biases), the layer, and what it is by definition.

    Expert 2 stays idle.
    """
    generator = torch.Generator().manual_seed(7)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=FP64).requires_grad_()

    in_order = request.param != "tokens"
    ids = torch.tensor([[0, 1], [3, 0], [1, 3], [3, 1], [0, 3]])
    if in_order:
        ids = torch.tensor([0, 0, 1, 3, 3]).unsqueeze(1)
    x, weights, mlp = leaf(5, 8), leaf(*ids.shape), (leaf(4, 12, 8), leaf(4, 8, 6))
    biases = (leaf(4, 12), leaf(4, 8))

    def layer(bias: bool) -> Tensor:
        given = biases if bias else ()
        if in_order:
            return expert_mlp(x, torch.tensor([2, 1, 0, 2]), *mlp, "swiglu", *given)
        return expert_layer(x, weights, order_by_expert(ids, 4), *mlp, "swiglu", *given)

    def definition(bias: bool) -> Tensor:
        ones = torch.ones_like(weights) if in_order else weights
        return reference.moe(x, ones, ids, *mlp, "swiglu", *(biases if bias else ()))

    leaves = [x, *([] if in_order else [weights]), *mlp]
    return lambda bias: [*leaves, *(biases if bias else ())], layer, definition


PAIRS = [(a, b, False) for a in WITHOUT_BIASES for b in WITHOUT_BIASES]
PAIRS += [(a, b, True) for a, b in ((TORCH, TORCH), (HOPPER, HOPPER), (HOPPER, TORCH))]


@pytest.mark.parametrize(("forward", "backward", "bias"), PAIRS)
def test_any_backward_takes_what_a_forward_left(monkeypatch, case, forward, backward, bias):
    """The second time through the graph, each has to make its own H."""
    leaves, layer, definition = case[0](bias), *case[1:]
    want = definition(bias)
    upstream = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, leaves, upstream, allow_unused=True)
    asked = []

    def choose(call: LayerCall, h: PreActivation | None = None):
        asked.append(h is not None)
        return IMPLEMENTATIONS[forward if len(asked) == 1 else backward]

    monkeypatch.setattr(choice, "choose", choose)
    out = layer(bias)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    for _ in range(2):
        grads = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-10)
    assert asked == [False, True, False]


@pytest.mark.parametrize("alone", range(4))
@pytest.mark.parametrize("name", WITHOUT_BIASES)
def test_each_gradient_alone(monkeypatch, case, name, alone):
    leaves, layer, definition = case[0](False), *case[1:]
    if alone == len(leaves):
        pytest.skip("rows in expert order have no weights")
    upstream = torch.randn(5, 8, dtype=FP64)
    (want,) = torch.autograd.grad(definition(False), leaves[alone], upstream)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == alone)
    monkeypatch.setattr(choice, "choose", lambda *_: IMPLEMENTATIONS[name])
    (got,) = torch.autograd.grad(layer(False), leaves[alone], upstream)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_hoppers_backward_refuses_an_h_without_its_bias():
    x, up, down = torch.randn(2, 8), torch.randn(1, 12, 8), torch.randn(1, 8, 6)
    counts = torch.tensor([2])
    up_bias, wanted = torch.randn(1, 12), Wanted(*[True] * 6)
    call = LayerCall(
        *(x, None, up, down, up_bias, None, None, None, counts, counts.int(), "swiglu")
    )
    h = PreActivation(torch.randn(2, 12), False)
    with pytest.raises(AssertionError):
        IMPLEMENTATIONS[HOPPER].backward_(call, torch.randn(2, 8), h, wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_who_makes_h_again_is_who_takes_it(monkeypatch, case, bias):
    """And makes the bits of its forward; what it takes must be its own."""
    leaves, layer = case[0](bias), case[1]
    calls: list[tuple[str, str, Tensor]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.implementation = name, IMPLEMENTATIONS[name]

        def forward(self, call, keep_h):
            out, h = self.implementation.forward(call, keep_h)
            calls.append(("forward", self.name, h.rows.clone()))
            return out, h

        def pre_activation(self, call):
            h = self.implementation.pre_activation(call)
            calls.append(("pre_activation", self.name, h.rows.clone()))
            return h

        def backward_(self, call, grad, h, wanted):
            calls.append(("backward_", self.name, h.rows.clone()))
            return self.implementation.backward_(call, grad, h, wanted)

    for name in WITH_BIASES if bias else WITHOUT_BIASES:
        calls.clear()
        monkeypatch.setattr(choice, "choose", lambda call, h=None, name=name: Recorder(name))
        out = layer(bias)
        for _ in range(2):
            torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        assert [(what, who) for what, who, _ in calls] == [
            ("forward", name),
            ("backward_", name),
            ("pre_activation", name),
            ("backward_", name),
        ]
        for _, _, rows in calls[1:]:
            assert torch.equal(rows, calls[0][2]), name


@pytest.mark.parametrize(
    ("name", "bias"),
    [(name, False) for name in WITHOUT_BIASES] + [(name, True) for name in WITH_BIASES],
)
def test_without_a_backward_no_h_is_kept(monkeypatch, case, name, bias):
    kept = []

    def choose(call: LayerCall, h: PreActivation | None = None):
        kept.append(IMPLEMENTATIONS[name].forward(call, False)[1])
        return IMPLEMENTATIONS[name]

    monkeypatch.setattr(choice, "choose", choose)
    out = case[1](bias)
    assert kept[0].rows.untyped_storage().nbytes() == 0
    assert kept[0].rows.shape == (0, 12)
    with torch.no_grad():
        assert torch.equal(case[1](bias), out)
