"""The grouped GEMMs of compute capability 9.0 against fp64, on ragged and degenerate routings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from gpu.closeness import close, same_bits

from lightning_fastmoe.ops import ACTIVATIONS, is_gated, kernels, native
from lightning_fastmoe.ops.activation import apply_activation
from lightning_fastmoe.ops.products import hopper

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="these kernels are for compute capability 9.0",
)

DTYPES = [torch.bfloat16, torch.float16]
# T, D, F, E, K and how tokens choose. Tiles are 128 rows (in pairs) x 256 columns x 64 of K.
CASES = [
    (512, 128, 128, 2, 1, "even"),
    (1000, 256, 256, 4, 2, "even"),
    (777, 200, 72, 5, 2, "even"),  # no dimension is a multiple of its tile
    (301, 72, 328, 7, 3, "half"),  # idle experts
    (999, 512, 384, 8, 2, "one"),
    (1, 64, 64, 3, 1, "even"),
    (130, 8, 8, 40, 1, "even"),  # the smallest rows
    (2000, 1536, 256, 16, 4, "skewed"),
    (4099, 264, 520, 6, 2, "one"),  # the weight gradients of the busy expert are split
    (700, 2048, 1024, 4, 2, "one"),  # those of up fill the chip by themselves and are not
    (0, 64, 64, 4, 2, "even"),
]


@pytest.fixture(autouse=True)
def library() -> Any:
    found = native.load()
    if found is None:
        pytest.fail(f"the kernels are not available: {native.unavailable_reason()}")
    return found


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


class Groups(NamedTuple):
    order: torch.Tensor
    offsets: torch.Tensor
    counts: list[int]
    top_k: int

    @property
    def tokens(self) -> torch.Tensor:
        return self.order // self.top_k

    def product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Each expert's rows times its matrix, (E, k, width), in fp64."""
        parts = [c.double() @ w.double() for c, w in zip(rows.split(self.counts), weight)]  # noqa: B905
        return torch.cat(parts)

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = zip(a.split(self.counts), b.split(self.counts), strict=True)
        return torch.stack([x.double().T @ y.double() for x, y in pairs])


def groups(tokens: int, experts: int, top_k: int, skew: str) -> Groups:
    if skew == "one":
        ids = torch.full((tokens, top_k), experts // 2, device="cuda")
    elif skew == "skewed":
        odds = torch.arange(1, experts + 1, device="cuda").float() ** -1.5
        ids = torch.multinomial(odds.expand(tokens, experts), top_k)
    else:
        step = 2 if skew == "half" else 1
        ids = torch.rand(tokens, experts // step, device="cuda").argsort(dim=1)[:, :top_k] * step
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=experts)
    order = torch.sort(flat, stable=True).indices
    return Groups(order, counts.cumsum(0).to(torch.int32), counts.tolist(), top_k)


def kernel_names(function: Callable[[], Any]) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[int, int, int, Groups]:
    tokens, d_model, d_ffn, experts, top_k, skew = request.param
    torch.manual_seed(tokens)
    return tokens, d_model, d_ffn, groups(tokens, experts, top_k, skew)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_up_forward(library: Any, case: Any, name: str, dtype: torch.dtype) -> None:
    tokens, d_model, d_ffn, g = case
    height = d_ffn * (2 if is_gated(name) else 1)
    x = randn(tokens, d_model, dtype=dtype)
    up = randn(len(g.counts), height, d_model, dtype=dtype, scale=d_model**-0.5)
    bias = randn(len(g.counts), height, dtype=dtype)
    assert hopper.hopper(x, up) is not None
    exact = g.product(x[g.tokens], up.transpose(1, 2))
    per_row = bias.double().repeat_interleave(torch.tensor(g.counts, device="cuda"), dim=0)
    for b, want in ((None, exact), (bias, exact + per_row)):
        h, a = same_bits(
            lambda b=b: hopper.up_forward(library, x, g.order, g.top_k, g.offsets, up, name, b)
        )
        close(h, want)
        close(a, kernels.activation(want, name))
        none, again = hopper.up_forward(
            library, x, g.order, g.top_k, g.offsets, up, name, b, keep_h=False
        )
        assert none.shape == (0, height)
        assert torch.equal(again, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_backward_activation(library: Any, case: Any, name: str, dtype: torch.dtype) -> None:
    tokens, d_model, d_ffn, g = case
    grad = randn(tokens, d_model, dtype=dtype)
    down = randn(len(g.counts), d_model, d_ffn, dtype=dtype, scale=d_ffn**-0.5)
    h = randn(tokens * g.top_k, d_ffn * (2 if is_gated(name) else 1), dtype=dtype)
    weights = torch.rand(tokens, g.top_k, device="cuda")

    def backward() -> tuple[torch.Tensor, ...]:
        d_h = h.clone()
        found = hopper.backward_activation_(
            library, grad, g.order, g.offsets, down, d_h, weights, name
        )
        return d_h, *found

    d_h, weighted, d_weights = same_bits(backward)
    d_act = g.product(grad[g.tokens], down)
    want_h = h.double()
    want_weights = kernels.activation_backward_(want_h, d_act, weights.double(), g.order, name)
    close(d_h, want_h)
    close(weighted, d_act)  # which the twin has overwritten
    # fp32, but the tensor cores cut off what they add rather than round it.
    close(d_weights, want_weights, factor=100)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(library: Any, name: str) -> None:
    g = groups(300, 4, 2, "even")
    height = 136 * (2 if is_gated(name) else 1)
    x, grad = randn(300, 64, dtype=torch.bfloat16), randn(300, 64, dtype=torch.bfloat16)
    up = randn(4, height, 64, dtype=torch.bfloat16, scale=0.2)
    down = randn(4, 64, 136, dtype=torch.bfloat16, scale=0.1)
    weights = torch.rand(300, 2, device="cuda")
    h, a = hopper.up_forward(library, x, g.order, 2, g.offsets, up, name)
    close(a, kernels.activation(g.product(x[g.tokens], up.transpose(1, 2)), name))
    want = h.double()
    weighted, _ = hopper.backward_activation_(
        library, grad, g.order, g.offsets, down, h, weights, name
    )
    d_act = g.product(grad[g.tokens], down)
    kernels.activation_backward_(want, d_act, weights.double(), g.order, name)
    close(h, want)
    close(weighted, d_act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_value_and_slope_of_each_number(library: Any, name: str, dtype: torch.dtype) -> None:
    """Far out, too, where the norms of the other tests see nothing."""
    h = torch.linspace(-14, 14, 1024, device="cuda").to(dtype)
    one = torch.zeros(1, 64, dtype=dtype, device="cuda")
    one[0, 0] = 1
    up = torch.zeros(1, 1024, 64, dtype=dtype, device="cuda")
    up[0, :, 0] = h
    down = torch.zeros(1, 64, 1024, dtype=dtype, device="cuda")
    down[0, 0] = 1  # so that the gradient of each activation is 1
    order, offsets = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    order, offsets, weights = order.cuda(), offsets.cuda(), torch.ones(1, 1, device="cuda")
    got_h, value = hopper.up_forward(library, one, order, 1, offsets, up, name)
    assert torch.equal(got_h[0], h)
    slope = got_h
    hopper.backward_activation_(library, one, order, offsets, down, slope, weights, name)
    exact = h.double().requires_grad_()
    want = apply_activation(exact, name)
    want.sum().backward()
    assert exact.grad is not None
    # Half a unit in the last place; and what Phi is off by, in bf16 half of the hardware's tanh.
    rounding = 1.01 * torch.finfo(dtype).eps / 2
    phi = 1.3 * (2.0**-12 if dtype == torch.bfloat16 and name == "gelu" else 2.0**-22)
    smallest = torch.finfo(torch.float16).tiny * torch.finfo(torch.float16).eps
    value_bound = rounding * want.abs() + phi * h.double().abs() + smallest
    slope_bound = rounding * exact.grad.abs() + phi + smallest
    assert bool(((value[0].double() - want).abs() <= value_bound).all())
    assert bool(((slope[0].double() - exact.grad).abs() <= slope_bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_product(library: Any, case: Any, transposed: bool, dtype: torch.dtype) -> None:
    tokens, d_model, d_ffn, g = case
    rows = randn(tokens * g.top_k, d_ffn, dtype=dtype)
    shape = (d_model, d_ffn) if transposed else (d_ffn, d_model)
    weight = randn(len(g.counts), *shape, dtype=dtype, scale=d_ffn**-0.5)
    got = same_bits(lambda: hopper.rows_product(library, rows, g.offsets, weight, transposed))
    close(got, g.product(rows, weight.transpose(1, 2) if transposed else weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_product_to_places(
    library: Any, case: Any, transposed: bool, dtype: torch.dtype
) -> None:
    tokens, d_model, d_ffn, g = case
    count = tokens * g.top_k
    rows = randn(count, d_ffn, dtype=dtype)
    shape = (d_model, d_ffn) if transposed else (d_ffn, d_model)
    weight = randn(len(g.counts), *shape, dtype=dtype, scale=d_ffn**-0.5)
    weights = torch.rand(count, 1, device="cuda")
    product = g.product(rows, weight.transpose(1, 2) if transposed else weight)
    want = torch.empty_like(product)
    want[g.order] = product
    args = (library, rows, g.offsets, weight, transposed, g.order)
    close(same_bits(lambda: hopper.rows_product(*args)), want)
    close(same_bits(lambda: hopper.rows_product(*args, weights)), weights.double() * want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradient(library: Any, case: Any, transposed: bool, dtype: torch.dtype) -> None:
    tokens, d_model, d_ffn, g = case
    gathered = randn(tokens, d_model, dtype=dtype)
    rows = randn(tokens * g.top_k, d_ffn, dtype=dtype)
    got = same_bits(
        lambda: hopper.weight_gradient(
            library, gathered, g.order, g.top_k, rows, g.offsets, transposed
        )
    )
    want = g.outer(gathered[g.tokens], rows)
    close(got, want.transpose(1, 2) if transposed else want)
    for expert, count in enumerate(g.counts):
        if count == 0:
            assert not bool(got[expert].any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("last", [1024, 100, 0])
def test_the_last_wave_of_weight_gradients_is_split(
    library: Any, last: int, transposed: bool, dtype: torch.dtype
) -> None:
    # 9 work tiles of 256 x 256 for each of 16 experts: two waves of 66 clusters, and 12 tiles that
    # are split in four. The last expert has most of them; with 100 rows not all splits have any.
    if torch.cuda.get_device_properties(0).multi_processor_count != 132:
        pytest.skip("the shapes are for 132 multiprocessors")
    m, n, top_k = 712, 760, 2
    rest = 16384 - last
    counts = [rest // 15 + (e < rest % 15) for e in range(15)] + [last]
    torch.manual_seed(last)
    order = torch.randperm(16384, device="cuda")
    offsets = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    g = Groups(order, offsets, counts, top_k)
    gathered = randn(16384 // top_k, m, dtype=dtype)
    rows = randn(16384, n, dtype=dtype)

    def gradient() -> torch.Tensor:
        return hopper.weight_gradient(library, gathered, order, top_k, rows, offsets, transposed)

    got = same_bits(gradient)
    want = g.outer(gathered[g.tokens], rows)
    close(got, want.transpose(1, 2) if transposed else want)
    assert any("reduce_last_wave_kernel" in name for name in kernel_names(gradient))
    assert last > 0 or not bool(got[-1].any())


def test_weight_gradients_of_experts_just_long_enough_to_be_split(library: Any) -> None:
    # As many as there can be: the workspace has room for these splits and no more.
    rows_in_all, m, n = 16384, 256, 256
    split_rows = -(-rows_in_all // 118 // 64) * 64  # see rows_per_split, on 132 multiprocessors
    counts = [split_rows + 1] * (rows_in_all // (split_rows + 1))
    counts.append(rows_in_all - sum(counts))
    order = torch.randperm(rows_in_all, device="cuda")
    offsets = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    g = Groups(order, offsets, counts, 1)
    gathered = randn(rows_in_all, m, dtype=torch.bfloat16)
    rows = randn(rows_in_all, n, dtype=torch.bfloat16)
    got = same_bits(
        lambda: hopper.weight_gradient(library, gathered, order, 1, rows, offsets, False)
    )
    close(got, g.outer(gathered[order], rows))


def test_an_expert_does_not_see_its_neighbours_infinities(library: Any) -> None:
    """Tiles reach beyond an expert's last row, and zero times infinity is not zero."""
    g = groups(200, 2, 1, "even")
    bad = g.counts[0]
    rows = randn(200, 64, dtype=torch.bfloat16)
    rows[bad:] = torch.inf
    x = randn(200, 128, dtype=torch.bfloat16)
    for transposed in (False, True):
        got = hopper.weight_gradient(library, x, g.order, 1, rows, g.offsets, transposed)
        assert bool(got[0].isfinite().all())
        assert not bool(got[1].isfinite().any())
    weight = randn(2, 64, 128, dtype=torch.bfloat16)
    assert bool(hopper.rows_product(library, rows, g.offsets, weight, False)[:bad].isfinite().all())


def test_in_a_cuda_graph(library: Any) -> None:
    """Captured with one routing, replayed with another."""
    g, other = groups(700, 6, 2, "even"), groups(700, 6, 2, "one")
    order, offsets = g.order.clone(), g.offsets.clone()
    x, up = randn(700, 64, dtype=torch.bfloat16), randn(6, 512, 64, dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        h, a = hopper.up_forward(library, x, order, 2, offsets, up, "swiglu")
        return h, a, hopper.weight_gradient(library, x, order, 2, h, offsets, True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    order.copy_(other.order)
    offsets.copy_(other.offsets)
    graph.replay()
    replayed = [r.clone() for r in results]
    for a, b in zip(replayed, step(), strict=True):
        assert torch.equal(a, b)


def test_every_operator_passes_opcheck(library: Any) -> None:
    g = groups(40, 3, 2, "even")
    x, up = randn(40, 64, dtype=torch.bfloat16), randn(3, 64, 64, dtype=torch.bfloat16)
    down, weights = randn(3, 64, 32, dtype=torch.bfloat16), torch.rand(40, 2, device="cuda")
    h, a = library.hopper_up_forward(x, g.order, 2, g.offsets, up, None, "swiglu", True)
    calls = [
        (library.hopper_up_forward, (x, g.order, 2, g.offsets, up, None, "swiglu", True)),
        (library.hopper_up_forward, (x, g.order, 2, g.offsets, up, None, "relu", False)),
        (
            library.hopper_backward_activation_,
            (x, g.order, g.offsets, down, h, weights, "swiglu"),
        ),
        (library.hopper_rows_product, (a, g.offsets, down, True, None, None)),
        (library.hopper_rows_product, (h, g.offsets, up, False, g.order, weights.view(80, 1))),
        (library.hopper_weight_gradient, (x, g.order, 2, h, g.offsets, True)),
        (library.hopper_weight_gradient, (x, g.order, 2, a, g.offsets, False)),
    ]
    fp32, weight = torch.randn(40, 5, device="cuda"), torch.randn(5, 64, device="cuda")
    gradient = library.hopper_bf16_parts(fp32, 4)
    calls += [
        *((library.hopper_bf16_parts, (fp32, count)) for count in (2, 3, 4)),
        (library.hopper_router_logits, (x, up[:, :1].contiguous())),
        (library.hopper_router_logits, (x, library.hopper_bf16_parts(weight, 3))),
        (library.hopper_router_weight_gradient, (x, gradient, 3, 5, False)),
        (library.hopper_router_weight_gradient, (x, gradient, 2, 5, True)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args)


def test_what_they_take_and_what_they_refuse(library: Any) -> None:
    x, up = randn(9, 64, dtype=torch.bfloat16), randn(3, 64, 64, dtype=torch.bfloat16)
    assert hopper.hopper(x, up) is not None
    assert hopper.hopper(x.float(), up.float()) is None
    assert hopper.hopper(x, up.half()) is None
    assert hopper.hopper(x[:, :60], up) is None
    assert hopper.hopper(randn(9, 60, dtype=torch.bfloat16)) is None
    assert hopper.hopper(x, up.transpose(1, 2)) is None
    assert hopper.hopper(x.flatten()[8:72].view(1, 64), up) is not None
    assert hopper.hopper(x.flatten()[1:65].view(1, 64), up) is None  # off the 16-byte grid
    g = groups(9, 3, 2, "even")
    with pytest.raises(RuntimeError, match="order must have at most size 9, not 18"):
        library.hopper_up_forward(x, g.order, 1, g.offsets, up, None, "swiglu", True)
    with pytest.raises(RuntimeError, match="must be Int"):
        library.hopper_up_forward(x, g.order, 2, g.offsets.long(), up, None, "swiglu", True)
    with pytest.raises(RuntimeError, match="multiple of 8 elements, not 60"):
        library.hopper_rows_product(x[:, :60].contiguous(), g.offsets, up, False, None, None)
    with pytest.raises(RuntimeError, match="both or none"):
        library.hopper_rows_product(x, g.offsets, up, False, None, torch.ones(9, 1, device="cuda"))
    with pytest.raises(RuntimeError, match="order must have size 9 in dimension 0, not 8"):
        library.hopper_rows_product(x, g.offsets, up, False, g.order[:8].contiguous(), None)
    with pytest.raises(RuntimeError, match="weights must have size 9"):
        library.hopper_rows_product(
            x, g.offsets, up, False, g.order[:9].contiguous(), torch.ones(8, 1, device="cuda")
        )
    with pytest.raises(RuntimeError, match="unknown activation 'tanh'"):
        library.hopper_up_forward(x, g.order, 2, g.offsets, up, None, "tanh", True)
