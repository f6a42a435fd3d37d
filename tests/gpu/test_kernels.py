"""Each kernel against its torch twin: odd sizes, poison, equal bits, no host sync, CUDA graphs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu.closeness import close, host_never_waits, same_bits

from lightning_fastmoe.ops import (
    ACTIVATIONS,
    ExpertOrder,
    choice,
    expert_layer,
    expert_mlp,
    is_gated,
    kernels,
    native,
    order_by_expert,
    order_of_held,
    softmax_top_k,
    top_k,
)
from lightning_fastmoe.ops.layer_call import LayerCall, Wanted
from lightning_fastmoe.ops.products.torch import TorchProducts
from lightning_fastmoe.ops.routing import score_top_k_backward
from lightning_fastmoe.ops.steps import Steps
from lightning_fastmoe.ops.two_operators import TwoOperators

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 8, 64, 200, 2048, 4104]
ROUTES = [
    (1, 1, 1),
    (5, 1, 7),
    (129, 8, 64),
    (33, 5, 5),
    (257, 32, 33),
    (64, 7, 1000),
    (9, 32, 1024),
]
ROUTES += [(0, 2, 8)]
"""(T, K, E)."""


@pytest.fixture(autouse=True)
def library() -> Any:
    found = native.load()
    if found is None:
        pytest.fail(f"the kernels are not available: {native.unavailable_reason()}")
    return found


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What torch.empty returns on the device is NaN, or an index far out of range."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def routed(tokens: int, k: int, experts: int) -> tuple[torch.Tensor, ExpertOrder]:
    ids = torch.rand(tokens, experts, device="cuda").argsort(dim=1)[:, :k]
    return ids, order_by_expert(ids, experts)


def some_pairs(
    tokens: int, k: int, experts: int, fraction: float
) -> tuple[ExpertOrder, torch.Tensor]:
    """An order in which that fraction of the pairs has a row, and (T, K) which ones."""
    torch.manual_seed(5)
    has_row = torch.rand(tokens, k, device="cuda") < fraction
    ids = torch.randint(experts, (tokens, k), device="cuda").masked_fill(~has_row, experts)
    return order_by_expert(ids, experts + 1).first(experts, int(has_row.sum())), has_row


@pytest.mark.parametrize("size", ROUTES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "biased sigmoid"])
def test_route_equals_its_definition_in_fp64(
    library: Any, size: tuple[int, int, int], normalize: bool, score: str
) -> None:
    tokens, k, experts = size
    torch.manual_seed(1)
    logits = 2 * torch.randn(tokens, experts, device="cuda")
    sigmoid = score != "softmax"
    bias = torch.randn(experts, device="cuda") if score == "biased sigmoid" else None
    scores, weights, ids = same_bits(lambda: library.route(logits, bias, k, normalize, sigmoid))
    exact = torch.sigmoid(logits.double()) if sigmoid else torch.softmax(logits.double(), dim=-1)
    close(scores, exact / exact.sum(-1, keepdim=True))
    assert ids.dtype == torch.int64
    if bias is None:
        assert torch.equal(ids, top_k(logits, k))
    else:  # but for what the last bit of a sigmoid decides
        ranked = (exact + bias).gather(1, ids)
        best = (exact + bias).sort(dim=1, descending=True).values[:, :k]
        torch.testing.assert_close(ranked, best, rtol=0, atol=1e-6)
    chosen = exact.gather(1, ids)
    close(weights, chosen / chosen.sum(-1, keepdim=True) if normalize else chosen)

    d_scores, d_weights = torch.randn_like(scores), torch.randn_like(weights)
    saved = (logits, weights, ids)
    for given in [(d_scores, d_weights), (None, d_weights), (d_scores, None)]:
        got = same_bits(
            lambda given=given: library.route_backward(*saved, *given, normalize, sigmoid)
        )
        wide = [None if g is None else g.double() for g in given]
        wide_saved = (logits.double(), weights.double(), ids)
        want = score_top_k_backward(*wide_saved, *wide, normalize, sigmoid)
        assert want is not None
        # With K = 1 or E = 1 large terms may cancel to nothing.
        close(got, want, factor=10, floor=1e-6 * (tokens * experts) ** 0.5)


def far_logits(experts: int) -> torch.Tensor:
    """(T, E): far from zero on either side, equal, or one far above or below the rest."""
    torch.manual_seed(experts)
    row = torch.randn(experts)
    rows = [far + row for far in (0.0, -20.0, -90.0, -104.0, -200.0, 20.0, 100.0, 1e4, -1e4)]
    rows += [torch.full((experts,), far) for far in (0.0, -100.0, 1e4, -1e4)]
    for value, rest in ((1e4, -150.0), (-1e4, 0.0)):
        one = rest + row
        one[experts // 2] = value
        rows.append(one)
    return torch.stack([*rows, 100 * row, 1e4 * row]).cuda()


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 33), (8, 64), (32, 100), (4, 1000)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("biased", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route_far_from_zero(
    library: Any,
    size: tuple[int, int],
    normalize: bool,
    sigmoid: bool,
    biased: float | None,
    dtype: torch.dtype,
) -> None:
    """Each number by itself against fp64; the dtype is that which rounded the logits."""
    k, experts = size
    logits = far_logits(experts).to(dtype).float()
    bias = None if biased is None else biased * torch.randn(experts, device="cuda")
    scores, weights, ids = same_bits(lambda: library.route(logits, bias, k, normalize, sigmoid))
    wide = logits.double().requires_grad_()
    log_scores = torch.nn.functional.logsigmoid(wide) if sigmoid else wide
    exact = torch.softmax(log_scores, dim=-1)
    if biased != 1.0:  # with a bias of zero the logits decide
        assert torch.equal(ids, top_k(logits, k))
    chosen = log_scores.gather(1, ids)
    if normalize:
        exact_weights = torch.softmax(chosen, dim=-1)
    else:
        exact_weights = chosen.exp() if sigmoid else exact.gather(1, ids)
    torch.testing.assert_close(scores.double(), exact, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=2e-6, atol=1e-37)

    d_scores, d_weights = torch.randn_like(scores), torch.randn_like(weights)
    saved = (logits, weights, ids)
    for given in [(d_scores, d_weights), (None, d_weights), (d_scores, None)]:
        got = same_bits(
            lambda given=given: library.route_backward(*saved, *given, normalize, sigmoid)
        )
        outputs = [o for o, g in zip((exact, exact_weights), given, strict=True) if g is not None]
        upstream = [g.double() for g in given if g is not None]
        (want,) = torch.autograd.grad(outputs, wide, upstream, retain_graph=True)
        # <scores, d_scores> cancels to its own rounding.
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_a_negative_selection_bias_orders_as_numbers_do(library: Any) -> None:
    logits = torch.zeros(1, 6, device="cuda")
    bias = torch.tensor([-3.0, -0.5, -0.5, -1.0, 0.25, -2.0], device="cuda")
    assert library.route(logits, bias, 6, True, True)[2].tolist() == [[4, 1, 2, 3, 5, 0]]


def test_route_ties_nan_and_infinities(library: Any) -> None:
    logits = torch.zeros(8, 70, device="cuda")
    logits[1, 33] = torch.nan
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4, 5:] = -torch.inf
    logits[5, 69] = torch.inf
    logits[6] = torch.nan
    logits[6].view(torch.int32).bitwise_or_(-(2**31))  # NaN with the sign bit
    logits[7, 40:] = 1
    first = list(range(9))
    want = [first, [33, *first[:8]], first, first, first, [69, *first[:8]], first]
    want.append(list(range(40, 49)))
    assert library.route(logits, None, 9, True, False)[2].tolist() == want
    bias = torch.zeros(70, device="cuda")  # which leaves ties, that the logits break
    for sigmoid in (False, True):
        got = library.route(logits, bias, 9, True, sigmoid)[2].tolist()
        assert len(set(got[1])) == 9  # a NaN among ties stands anywhere
        assert got[:1] + got[2:] == want[:1] + want[2:]


def test_softmax_top_k_gradients() -> None:
    logits = torch.randn(50, 12, device="cuda", requires_grad=True)
    scores, weights, ids = softmax_top_k(logits, 3, True)
    assert "ScoreTopK" in str(scores.grad_fn)
    assert not ids.requires_grad
    d_scores, d_weights = torch.randn_like(scores), torch.randn_like(weights)
    (got,) = torch.autograd.grad((scores, weights), logits, (d_scores, d_weights))
    wide = logits.detach().double().requires_grad_()
    outputs = softmax_top_k(wide, 3, True)[:2]
    (want,) = torch.autograd.grad(outputs, wide, (d_scores.double(), d_weights.double()))
    close(got, want, factor=10)


@pytest.mark.parametrize("experts", [1, 2, 3, 63, 64, 65, 1000, 1024])
@pytest.mark.parametrize("pairs", [0, 1, 31, 2048, 2049, 70001])
@pytest.mark.parametrize("skew", ["even", "one", "ends"])
def test_sort_equals_its_cpu_twin(library: Any, experts: int, pairs: int, skew: str) -> None:
    torch.manual_seed(pairs)
    ids = torch.randint(experts, (pairs,), device="cuda")
    if skew == "one":
        ids.fill_(experts // 2)
    elif skew == "ends":
        ids = torch.where(ids % 2 == 0, 0, experts - 1)
    got = same_bits(lambda: library.sort_by_expert(ids, experts, experts))
    order, inverse, counts, offsets = (t.cpu() for t in got)
    want = order_by_expert(ids.cpu(), experts)
    assert torch.equal(order, want.order)
    assert torch.equal(inverse, want.inverse)
    assert torch.equal(counts, want.tokens_per_expert)
    assert torch.equal(offsets, want.offsets)
    assert offsets.dtype == torch.int32


@pytest.mark.parametrize("pairs", [0, 1, 999, 300_001])
@pytest.mark.parametrize("held", [1, 7, 1023])
def test_an_order_of_held_experts_equals_its_cpu_twin(pairs: int, held: int) -> None:
    ids = torch.randint(held + 1, (pairs,), generator=torch.Generator().manual_seed(pairs))
    exact = int((ids < held).sum())
    for rows in (exact, (exact + pairs) // 2):
        got, want = (order_of_held(one, held, rows) for one in (ids.cuda(), ids))
        for name in ("order", "inverse", "tokens_per_expert", "offsets"):
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name


@pytest.mark.parametrize("experts", [64, 640])
def test_sort_of_many_blocks(library: Any, experts: int) -> None:
    """More pairs than the blocks of one launch take at a time; few counts to add, and many."""
    ids = torch.randint(experts, (3_000_001,), device="cuda")
    order, inverse, counts, _ = library.sort_by_expert(ids, experts, experts)
    want = torch.sort(ids, stable=True).indices
    assert torch.equal(order, want)
    assert torch.equal(inverse[order], torch.arange(ids.numel(), device="cuda"))
    assert torch.equal(counts, torch.bincount(ids, minlength=experts))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", [(37, 3, 5), (1, 1, 1), (64, 8, 8), (0, 2, 4)], ids=str)
def test_permuted_rows_are_exact_even_unaligned(
    library: Any, size: tuple[int, int, int], width: int, dtype: torch.dtype
) -> None:
    tokens, k, experts = size
    _, order = routed(tokens, k, experts)
    x = (100 * torch.rand(tokens, width, device="cuda")).to(dtype)
    got = same_bits(lambda: library.permute_rows(x, order.inverse, k))
    assert torch.equal(got, x[order.order // k])
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)  # off the 16-byte grid
    assert torch.equal(library.permute_rows(odd, order.inverse, k), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "size",
    [(37, 3, 5), (1, 1, 1), (70, 1, 6), (50, 2, 4), (64, 8, 8), (33, 10, 11), (0, 2, 4)],
    ids=str,
)
def test_sums_of_rows_and_their_gradients_equal_fp64(
    library: Any, size: tuple[int, int, int], width: int, dtype: torch.dtype
) -> None:
    tokens, k, experts = size
    torch.manual_seed(2)
    _, order = routed(tokens, k, experts)
    rows = torch.randn(tokens * k, width, device="cuda").to(dtype)
    weights = torch.rand(tokens, k, device="cuda")
    bias = torch.randn(experts, width, device="cuda").to(dtype)
    for w, b in itertools.product((weights, None), (bias, None)):
        got = same_bits(
            lambda w=w, b=b: library.sum_rows(rows, order.inverse, w, k, b, order.offsets)
        )
        wide, wide_b = (None if t is None else t.double() for t in (w, b))
        close(got, kernels.sum_rows(rows.double(), order.inverse, wide, k, wide_b, order.offsets))

    grad = torch.randn(tokens, width, device="cuda").to(dtype)
    got = same_bits(lambda: library.unpermute_backward(grad, rows, weights, order.inverse))
    want = kernels.unpermute_backward(
        grad.double(), rows.double(), weights.double(), order.order, order.inverse
    )
    close(got[0], want[0])
    close(got[1], want[1], factor=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_sums_skip_pairs_without_a_row(
    library: Any, k: int, fraction: float, width: int, dtype: torch.dtype
) -> None:
    order, has_row = some_pairs(70, k, 5, fraction)
    rows = torch.randn(int(has_row.sum()), width, device="cuda").to(dtype)
    weights = torch.rand(70, k, device="cuda").masked_fill(~has_row, torch.nan)
    bias = torch.randn(5, width, device="cuda").to(dtype)
    for w, b in itertools.product((weights, None), (bias, None)):
        got = same_bits(
            lambda w=w, b=b: library.sum_rows(rows, order.inverse, w, k, b, order.offsets)
        )
        wide, wide_b = (None if t is None else t.double() for t in (w, b))
        close(got, kernels.sum_rows(rows.double(), order.inverse, wide, k, wide_b, order.offsets))
        assert bool((got[~has_row.any(1)] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [0, 37])
def test_activation_and_its_gradient_equal_fp64(
    library: Any, name: str, width: int, dtype: torch.dtype, tokens: int
) -> None:
    torch.manual_seed(3)
    k = 3
    _, order = routed(tokens, k, 5)
    shape = (tokens * k, width * (2 if is_gated(name) else 1))
    h = (3 * torch.randn(shape, device="cuda")).to(dtype)
    d_act = torch.randn(tokens * k, width, device="cuda").to(dtype)
    weights = torch.rand(tokens, k, device="cuda")
    bias = torch.randn(5, shape[1], device="cuda").to(dtype)
    for b in (None, bias):
        wide_b = None if b is None else b.double()
        got = same_bits(lambda b=b: library.activation(h, b, order.offsets, name))
        close(got, kernels.activation(h.double(), name, wide_b, order.offsets), factor=2)

        def backward(at: torch.Tensor | None, b: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            d_h, weighted = h.clone(), d_act.clone()
            d_weights = library.activation_backward_(
                d_h, weighted, weights, at, b, order.offsets, name
            )
            return d_h, d_weights, weighted

        for at in (order.order, None):
            got = same_bits(lambda at=at, b=b: backward(at, b))
            d_h, wide = h.double(), d_act.double()
            want = kernels.activation_backward_(
                d_h, wide, weights.double(), at, name, wide_b, order.offsets
            )
            close(got[0], d_h, factor=2)
            close(got[1], want, factor=20)
            close(got[2], wide, factor=2)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_far_out(library: Any, name: str, dtype: torch.dtype) -> None:
    """Large inputs saturate; they don't turn into NaN."""
    h = torch.tensor([-6e4, -300.0, -90.0, -0.0, 0.0, 90.0, 300.0, 6e4], device="cuda").to(dtype)
    h = (torch.cat([h, torch.ones_like(h)]) if is_gated(name) else h).unsqueeze(0)
    d_act = torch.ones(1, 8, device="cuda", dtype=dtype)
    wide = d_act.double()
    one = torch.ones(1, device="cuda")
    d_h, want = h.clone(), h.double()
    library.activation_backward_(d_h, d_act, one, None, None, None, name)
    kernels.activation_backward_(want, wide, one.double(), None, name)
    torch.testing.assert_close(d_h.double(), want, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(d_act.double(), wide, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 64, 32), (3, 7, 5), (1, 1, 1), (2, 300, 999)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_empty(library: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    counts = torch.arange(shape[0], device="cuda") % 2
    grad = torch.full(shape, torch.nan, device="cuda", dtype=dtype)
    with host_never_waits():
        library.zero_empty_experts_(grad, counts)
    assert bool((grad[counts == 0] == 0).all())
    assert bool(grad[counts == 1].isnan().all())


def test_every_operator_passes_opcheck(library: Any) -> None:
    ids, order = routed(9, 2, 5)
    logits, x = torch.randn(9, 5, device="cuda"), torch.randn(9, 8, device="cuda")
    scores, weights, chosen = library.route(logits, None, 2, True, False)
    rows, h = torch.randn(18, 8, device="cuda"), torch.randn(18, 16, device="cuda")
    calls = {
        library.route: (logits, None, 2, True, True),
        library.route_backward: (logits, weights, chosen, None, weights, True, False),
        library.sort_by_expert: (ids.flatten(), 5, 5),
        library.permute_rows: (x, order.inverse, 2),
        library.sum_rows: (rows, order.inverse, weights, 2, None, None),
        library.unpermute_backward: (x, rows, weights, order.inverse),
        library.activation: (h, torch.randn(5, 16, device="cuda"), order.offsets, "swiglu"),
        library.activation_backward_: (h, rows, weights, order.order, None, None, "swiglu"),
        library.zero_empty_experts_: (torch.randn(5, 4, device="cuda"), order.tokens_per_expert),
    }
    bf16 = [torch.randn(*shape, device="cuda").bfloat16() for shape in ((9, 8), (5, 16, 8))]
    down, pre = (torch.randn(*s, device="cuda").bfloat16() for s in ((5, 8, 8), (18, 16)))
    groups = (order.tokens_per_expert, order.offsets)
    calls[library.expert_layer] = (
        *(bf16[0], weights, bf16[1], down, order.order, order.inverse, order.offsets, "swiglu"),
        *(True, False),
    )
    calls[library.expert_layer_backward_] = (
        *(bf16[0], bf16[0], pre, weights, bf16[1], down, order.order, order.inverse, *groups),
        *("swiglu", True, False, True, False, False),
    )
    for op, args in calls.items():
        torch.library.opcheck(op.default, args)


def test_errors_name_the_rule(library: Any) -> None:
    x, inverse = torch.randn(4, 8, device="cuda"), torch.arange(8, device="cuda")
    with pytest.raises(RuntimeError, match="inverse must have size 12"):
        library.permute_rows(x, inverse, 3)
    with pytest.raises(RuntimeError, match="contiguous"):
        library.permute_rows(x.T, inverse, 1)
    with pytest.raises(RuntimeError, match="must be Long"):
        library.permute_rows(x, inverse.int(), 2)
    with pytest.raises(RuntimeError, match="unknown activation 'tanh'"):
        library.activation(x, None, None, "tanh")
    with pytest.raises(RuntimeError, match="top_k must be between"):
        library.route(x, None, 9, False, False)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        library.activation(x.double(), None, None, "relu")
    with pytest.raises(RuntimeError, match="a bias needs offsets"):
        library.activation(x, torch.zeros(2, 8, device="cuda"), None, "relu")


def layer_inputs(
    case: tuple[int, ...], dtype: torch.dtype, bias: bool = False
) -> tuple[list[torch.Tensor], ...]:
    tokens, width, inner, experts, k = case
    torch.manual_seed(4)
    shapes = [(tokens, width), (experts, 2 * inner, width), (experts, width, inner)]
    x, up, down = (torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in shapes)
    leaves = [x.to(dtype), torch.rand(tokens, k, device="cuda"), up.to(dtype), down.to(dtype)]
    if bias:
        leaves += [torch.randn(experts, n, device="cuda").to(dtype) for n in (2 * inner, width)]
    ids = torch.rand(tokens, experts, device="cuda").argsort(dim=1)[:, :k]
    return [leaf.requires_grad_() for leaf in leaves], [ids]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (257, 64, 96, 8, 2, 0.5),
        (1000, 1536, 256, 16, 8, 0.5),
        (64, 32, 16, 5, 5, 0.1),
        (33, 17, 23, 3, 2, 0.6),
        (50, 64, 32, 4, 1, 0.5),
        (40, 64, 32, 4, 3, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_which_some_pairs_have_no_row(
    case: tuple[Any, ...], dtype: torch.dtype, bias: bool
) -> None:
    """Output and gradients against the twins in fp64, twice through one graph."""
    *sizes, fraction = case
    leaves, _ = layer_inputs(tuple(sizes), dtype, bias)
    order, has_row = some_pairs(sizes[0], sizes[4], sizes[3], fraction)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for side in (leaves, wide):
        side[1] = side[1].detach().masked_fill(~has_row, torch.nan).requires_grad_()
    outs = [
        expert_layer(x, weights, order, up, down, "swiglu", *biases)
        for x, weights, up, down, *biases in (leaves, wide)
    ]
    upstream = torch.randn_like(outs[0])
    right = [outs[1], *torch.autograd.grad(outs[1], wide, upstream.double())]
    bound = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 7.5e-4}[dtype]
    for _ in range(2):
        found = [outs[0], *torch.autograd.grad(outs[0], leaves, upstream, retain_graph=True)]
        for a, b in zip(found, right, strict=True):
            assert float((a.double() - b).norm()) <= bound * float(b.norm())


def run_layer(leaves: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    x, weights, up, down, *biases = leaves
    order = order_by_expert(ids, up.shape[0])
    return expert_layer(x, weights, order, up, down, "swiglu", *biases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [(257, 64, 96, 8, 2), (64, 32, 16, 5, 5), (3, 64, 32, 40, 1), (33, 17, 23, 3, 2)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_equals_its_twin_in_fp64(
    case: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    """Idle experts, odd widths, K = 1 and K = E, against the twins in fp64."""
    leaves, (ids,) = layer_inputs(case, dtype, bias)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got, want = run_layer(leaves, ids), run_layer(wide, ids)
    upstream = torch.randn_like(got)
    # Sums of few terms cancel more than those of a real layer, whose bf16 error stays below 4e-3.
    bound = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 7.5e-4}[dtype]
    pairs = [(got, want)]
    grads = torch.autograd.grad(got, leaves, upstream)
    pairs += zip(grads, torch.autograd.grad(want, wide, upstream.double()), strict=True)
    for a, b in pairs:
        assert float((a.double() - b).norm()) <= bound * float(b.norm())

    rows = leaves[0].detach()[order_by_expert(ids, case[3]).order // case[4]].requires_grad_()
    counts = torch.bincount(ids.flatten(), minlength=case[3])
    mlp = (rows, *leaves[2:])
    wide = [leaf.detach().double().requires_grad_() for leaf in mlp]
    got = expert_mlp(mlp[0], counts, *mlp[1:3], "swiglu", *mlp[3:])
    want = expert_mlp(wide[0], counts, *wide[1:3], "swiglu", *wide[3:])
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, mlp, upstream)
    for a, b in zip(
        (got, *grads), (want, *torch.autograd.grad(want, wide, upstream.double())), strict=True
    ):
        assert float((a.double() - b).norm()) <= bound * float(b.norm())


@pytest.mark.parametrize("own_products", [False, True])
@pytest.mark.parametrize("rows_in_order", [False, True])
@pytest.mark.parametrize("frozen", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("inner", [96, 1024])
def test_two_operators_equal_the_steps(
    monkeypatch: pytest.MonkeyPatch,
    own_products: bool,
    rows_in_order: bool,
    frozen: int | None,
    inner: int,
) -> None:
    """To the bit with F.grouped_mm; with Hopper's own products up to roundings of bf16."""
    leaves, (ids,) = layer_inputs((257, 64, inner, 8, 2), torch.bfloat16)
    leaves = [leaf.detach().requires_grad_(i != frozen) for i, leaf in enumerate(leaves)]
    upstream = torch.randn_like(leaves[0])
    if own_products and choice.hopper(*(leaves[i].detach() for i in (0, 2, 3))) is None:
        pytest.skip("this GPU is not of compute capability 9.0")
    if not own_products:
        monkeypatch.setattr(choice, "hopper", lambda *_: None)
    chosen, choose = [], choice.choose
    monkeypatch.setattr(choice, "choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])

    def run() -> list[torch.Tensor]:
        if rows_in_order:
            counts = torch.tensor([0, 57, 1, 99, 0, 60, 40, 0], device="cuda")
            out = expert_mlp(leaves[0], counts, *leaves[2:], "swiglu")
        else:
            out = run_layer(leaves, ids)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(out, wanted, upstream, allow_unused=rows_in_order)
        return [out, *(grad for grad in grads if grad is not None)]

    got = run()
    assert [(type(c), c.on_hopper) for c in chosen] == [(TwoOperators, own_products)] * 2
    monkeypatch.setattr(choice, "choose", lambda *_: Steps(TorchProducts()))
    for a, b in zip(got, run(), strict=True):
        if own_products:
            assert float((a - b).norm()) <= 6e-3 * float(b.norm())
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("own_products", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_backward_that_keeps_h_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, own_products: bool, bias: bool
) -> None:
    leaves, (ids,) = layer_inputs((257, 64, 96, 8, 2), torch.bfloat16, bias)
    x, weights, up, down, *biases = (leaf.detach() for leaf in leaves)
    if own_products and choice.hopper(x, up, down) is None:
        pytest.skip("this GPU is not of compute capability 9.0")
    if not own_products:
        monkeypatch.setattr(choice, "hopper", lambda *_: None)
    order = order_by_expert(ids, 8)
    call = LayerCall(
        *(x, weights, up, down, *(biases or (None, None)), order.order, order.inverse),
        *(order.tokens_per_expert, order.offsets, "swiglu"),
    )
    _, h = choice.choose(call).forward(call, True)
    implementation = choice.choose(call, h)
    before, grad = h.rows.clone(), torch.randn_like(x)
    wanted = Wanted(*[True] * 4, bias, bias)
    kept = implementation.backward(call, grad, h, wanted)
    assert torch.equal(h.rows, before)
    overwritten = implementation.backward_(call, grad, h, wanted)
    assert not torch.equal(h.rows, before)
    for a, b in zip(kept, overwritten, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


FIRST_STEP = """
import torch
from lightning_fastmoe.ops import expert_layer, order_by_expert
x, up, down = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for s in ((64, 32), (4, 64, 32), (4, 32, 32)))
order = order_by_expert(torch.arange(64, device="cuda").unsqueeze(1) % 4, 4)
out = expert_layer(x, torch.ones(64, 1, device="cuda"), order, up, down, "swiglu")
out.backward(torch.ones_like(out))
assert all(bool(t.grad.isfinite().all()) for t in (x, up, down))
"""


def test_the_first_step_of_a_process() -> None:
    """Its backward runs in a thread that has not used the device before."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_graph_the_pre_activation_goes() -> None:
    leaves, (ids,) = layer_inputs((4096, 64, 1024, 8, 2), torch.bfloat16)
    want = run_layer(leaves, ids)
    peaks = []
    for enabled in (True, False):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(enabled):
            got = run_layer(leaves, ids)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.equal(got, want)
    assert peaks[1] < peaks[0] - 4096 * 2 * 1024 * 2


@pytest.mark.parametrize("bias", [False, True])
def test_backward_can_run_twice(bias: bool) -> None:
    leaves, (ids,) = layer_inputs((257, 64, 96, 8, 2), torch.bfloat16, bias)
    out = run_layer(leaves, ids)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves, upstream), strict=True):
        assert torch.equal(a, b)


def test_each_gradient_alone_is_that_among_all() -> None:
    leaves, (ids,) = layer_inputs((257, 64, 96, 8, 2), torch.bfloat16, bias=True)
    upstream = torch.randn(257, 64, device="cuda", dtype=torch.bfloat16)
    grads = torch.autograd.grad(run_layer(leaves, ids), leaves, upstream)
    for i, grad in enumerate(grads):
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        (found,) = torch.autograd.grad(run_layer(alone, ids), alone[i : i + 1], upstream)
        assert torch.equal(found, grad), i


@pytest.mark.parametrize("bias", [False, True])
def test_layer_never_waits_and_repeats_its_bits(bias: bool) -> None:
    leaves, (ids,) = layer_inputs((1031, 64, 96, 16, 4), torch.bfloat16, bias)
    upstream = torch.randn_like(leaves[0])

    def step() -> tuple[torch.Tensor, ...]:
        out = run_layer(leaves, ids)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    same_bits(step)


def test_layer_in_a_cuda_graph() -> None:
    """Captured once, replayed with other tokens that go to other experts."""
    leaves, (ids,) = layer_inputs((512, 64, 96, 16, 4), torch.bfloat16)
    upstream = torch.randn_like(leaves[0])

    def step() -> tuple[torch.Tensor, ...]:
        out = run_layer(leaves, ids)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        leaves[0].normal_()
        ids.copy_(torch.rand(512, 16, device="cuda").argsort(dim=1)[:, :4] // 2 * 2)
    graph.replay()
    replayed = [r.clone() for r in results]
    for a, b in zip(replayed, step(), strict=True):
        assert torch.equal(a, b)


def test_layer_of_no_tokens_and_of_one_busy_expert() -> None:
    leaves, (ids,) = layer_inputs((0, 64, 32, 4, 2), torch.bfloat16)
    grads = torch.autograd.grad(run_layer(leaves, ids).sum(), leaves)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
    assert all(float(g.abs().sum()) == 0 for g in grads)

    leaves, (ids,) = layer_inputs((64, 64, 32, 4, 1), torch.bfloat16)
    grads = torch.autograd.grad(run_layer(leaves, torch.full_like(ids, 2)).sum(), leaves)
    for grad in grads[2:]:
        assert float(grad[2].abs().sum()) > 0
        assert float(grad[[0, 1, 3]].abs().sum()) == 0


def test_double_backward_takes_the_differentiable_path() -> None:
    leaves, (ids,) = layer_inputs((16, 8, 8, 4, 2), torch.float32)
    out = run_layer(leaves, ids)
    (dx,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    dx.square().sum().backward()
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)
