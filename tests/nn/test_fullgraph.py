"""A layer inside the graph of torch.compile(..., fullgraph=True): one graph, the same numbers."""

from __future__ import annotations

import copy
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe.errors import ConfigError, NonFiniteError
from lightning_fastmoe.nn import MoE, moe_losses, runtime_ops, trace_layers
from lightning_fastmoe.nn.attached_loss import LossScale
from lightning_fastmoe.nn.experts.trained import train_rows
from lightning_fastmoe.nn.hooks import watch_replaced_hooks
from lightning_fastmoe.nn.nonfinite import take_largest
from lightning_fastmoe.nn.opaque import Reference

pytestmark = pytest.mark.poisoned(False)  # dynamo knows torch.empty by identity

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _no_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()


class Block(nn.Module):
    def __init__(self, **moe):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.moe = MoE(8, 16, 4, **{"load_balancing": 0.3, "z_loss": 0.2, **moe})
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.moe(self.norm(x))) + x)


def pair(backend="aot_eager", blocks=2, dtype=torch.float64, **moe):
    """A model, and a copy of it with compiled blocks."""
    torch.manual_seed(0)
    eager = nn.Sequential(*(Block(**moe) for _ in range(blocks))).to(dtype)
    compiled = copy.deepcopy(eager)
    for i, block in enumerate(compiled):
        block.moe.layer_name = f"blocks.{i}.moe"  # as a strategy names them
        block.compile(backend=backend, fullgraph=True)
    return eager, compiled


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def batches(*sizes: int, dtype=torch.float64) -> Iterator[Tensor]:
    for tokens in sizes:
        x = torch.randn(2, tokens, 8, dtype=dtype)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        yield x.requires_grad_()


def run(model: nn.Module, x: Tensor, step: Callable = lambda block, x: block(x)) -> Tensor:
    """A pass with a loss that is scaled after it was watched, as accumulation does."""
    model.zero_grad()
    y = x
    for block in model:
        y = step(block, y)
    loss = y.square().mean()
    for block in model:
        block.moe.loss_scale.watch(loss)
    (loss * 4).backward()
    return y


def assert_same(eager, compiled, got, want, tolerance):
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got, want, **close)
    for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}", **close)
    for a, b in zip(compiled, eager, strict=True):
        assert a.moe.last_losses.keys() == b.moe.last_losses.keys()
        for name, value in b.moe.last_losses.items():
            torch.testing.assert_close(a.moe.last_losses[name], value, **close)
        load = b.moe.router.load_since_update
        if load is not None:
            assert load.any()
            assert torch.equal(a.moe.router.load_since_update, load)


SETTINGS = {
    "plain": {},
    "no_loss": {"load_balancing": 0.0, "z_loss": 0.0},
    "top_1": {"top_k": 1},
    "bias": {"bias": True, "activation": "gelu"},
    "balance_bias": {"router_options": {"balance_bias": True}},
    "sigmoid": {"router": "sigmoid", "router_options": {"balance_bias": True}},
    "groups": {"router": "sigmoid", "router_options": {"num_groups": 2, "limit_groups": 1}},
    "cosine": {"router": "cosine"},
    "shared": {"shared_expert": 8, "shared_expert_gate": True},
    "losses": {"importance": 0.1, "sequence_balancing": 0.1, "global_balancing": 0.1},
    "capacity": {"capacity_factor": 0.6},
    "capacity_by_score": {"capacity_factor": 0.6, "drop_by": "score"},
}


AUTOGRAD = ("plain", "bias", "balance_bias")
"""Those for which AOT Autograd, too, makes the graphs; that takes seconds."""


@pytest.mark.parametrize("name", SETTINGS)
def test_two_layers_and_all_sizes_are_one_graph_with_the_same_numbers(name):
    eager, compiled = pair("aot_eager" if name in AUTOGRAD else "eager", **SETTINGS[name])
    for x in batches(5, 6, 11, 5):
        assert_same(eager, compiled, run(compiled, x), run(eager, x), 1e-12)
    assert graphs() == 1
    for model in (eager, compiled):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inductor(dtype):
    eager, compiled = pair("inductor", dtype=dtype, router_options={"balance_bias": True})
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for x in batches(5, 6, dtype=dtype):
        assert_same(eager, compiled, run(compiled, x), run(eager, x), tolerance)
    assert graphs() == 1
    with pytest.raises(NonFiniteError):
        compiled[0](torch.full((2, 5, 8), torch.nan, dtype=dtype, requires_grad=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_replays_around_a_compiled_block_count_once(reentrant):
    """The replay, inside the backward pass, comes after the loss's scale was set."""
    eager, compiled = pair(router_options={"balance_bias": True})

    def step(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    for x in batches(5, 6):
        assert_same(eager, compiled, run(compiled, x, step), run(eager, x, step), 1e-12)


@pytest.mark.parametrize(
    ("moe", "whole"),
    [({}, True), ({"expert": lambda d, f: nn.Linear(d, d)}, False)],
    ids=["traced", "experts that are modules"],
)
def test_layers_are_traced_where_they_can_be_without_fullgraph(moe, whole):
    torch.manual_seed(0)
    eager = nn.Sequential(*(Block(**moe) for _ in range(2))).double()
    compiled = copy.deepcopy(eager)
    trace_layers(compiled)
    for block in compiled:
        block.compile(backend="aot_eager")
    for x in batches(5, 6, 11):
        got, want = run(compiled, x), run(eager, x)
        assert_same(eager, compiled, got, want, 1e-12)
    assert not counters["graph_break"] if whole else counters["graph_break"]
    assert (graphs() == 1) == whole


@pytest.mark.parametrize("fullgraph", [False, True])
def test_checkpoints_inside_the_graph_are_refused_or_break_it(fullgraph):
    eager, _ = pair(router_options={"balance_bias": True})

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.moe = inner.moe

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    compiled = nn.Sequential(*(Checkpointed(copy.deepcopy(block)) for block in eager))
    for block in compiled:
        block.compile(backend="aot_eager", fullgraph=fullgraph)
    (x,) = batches(5)
    if fullgraph:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
            run(compiled, x)
    else:
        expected = run(eager, x)
        torch.testing.assert_close(run(compiled, x), expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(compiled, eager, strict=True):
            assert torch.equal(a.moe.router.load_since_update, b.moe.router.load_since_update)


def test_autocast_is_as_exact_as_eager():
    exact, _ = pair()
    eager, compiled = pair(dtype=torch.float32)
    for x in batches(5, 6, dtype=torch.float32):
        want = run(exact, x.detach().double().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16):
            found = [run(model, x) for model in (compiled, eager)]
        assert found[0].dtype == found[1].dtype == torch.bfloat16
        errors = [float((y.double() - want).detach().norm() / want.detach().norm()) for y in found]
        assert errors[0] <= 1.2 * errors[1] < 0.02
        for p, q, r in zip(*(m.parameters() for m in (compiled, eager, exact)), strict=True):
            off, usual = (float((t.grad.double() - r.grad).norm()) for t in (p, q))
            assert off <= 1.5 * usual + 1e-3 * float(r.grad.norm())


def test_frozen_parameters():
    for frozen in ("router", "experts"):
        eager, compiled = pair(blocks=1)
        for model in (eager, compiled):
            for block in model:
                getattr(block.moe, frozen).requires_grad_(False)
        (x,) = batches(5)
        assert_same(eager, compiled, run(compiled, x), run(eager, x), 1e-12)


CHANGES: dict[str, Callable[[MoE], None]] = {
    "coefficient": lambda moe: moe.loss_coefficients.update(z_loss=3.0),
    "other_coefficient": lambda moe: moe.loss_coefficients.update(z_loss=0.7),
    "top_k": lambda moe: setattr(moe, "top_k", 3),
    "capacity": lambda moe: setattr(moe, "capacity_factor", 0.5),
    "other_capacity": lambda moe: setattr(moe, "capacity_factor", 0.7),
    "evaluation": lambda moe: moe.eval() and None,
    "training": lambda moe: moe.train() and None,
}


def test_settings_may_change_between_passes():
    eager, compiled = pair("eager")
    norms = set()
    with torch._dynamo.config.patch(recompile_limit=20):
        for change in CHANGES.values():
            for model in (eager, compiled):
                for block in model:
                    change(block.moe)
            (x,) = batches(5)
            assert_same(eager, compiled, run(compiled, x), run(eager, x), 1e-12)
            norms.add(float(eager[0].moe.router.weight.grad.norm()))
    assert len(norms) == len(CHANGES)


def test_a_schedule_of_capacities_needs_no_new_graphs():
    eager, compiled = pair("eager", capacity_factor=2.0)
    norms, found = set(), []
    for factor in (2.0, 1.0, 0.8, 0.6):
        for model in (eager, compiled):
            for block in model:
                block.moe.capacity_factor = factor
        for x in batches(6):
            assert_same(eager, compiled, run(compiled, x), run(eager, x), 1e-12)
        norms.add(float(eager[0].moe.router.weight.grad.norm()))
        found.append(graphs())
    assert found == [1] * 4
    assert len(norms) > 2


def test_a_replay_runs_the_graph_of_its_pass():
    """Though the pass has left something for the strategy, which takes it after each step."""
    eager, compiled = pair()

    def step(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    found = []
    for top_k in (2, 1, 3):
        for model in (eager, compiled):
            for block in model:
                block.moe.top_k, block.moe.nonfinite_policy = top_k, "collect"
        for x in batches(5, 5):
            assert_same(eager, compiled, run(compiled, x, step), run(eager, x, step), 1e-12)
            for block in (*eager, *compiled):
                assert float(take_largest([block.moe.nonfinite], x.device)) > 0
        found.append(graphs())
    assert found == [1, 2, 3]


def test_nonfinite_logits_are_found_as_without_compiling():
    """Also where no loss reads the logits, so that nothing else in the graph does."""
    _, compiled = pair(load_balancing=0.0, z_loss=0.0)
    (x,) = batches(5)
    bad = (x * torch.nan).detach()
    for mode in (True, False):
        compiled.train(mode)
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            compiled(bad)
    for block in compiled:
        block.moe.nonfinite_policy = "ignore"
    assert compiled(bad).isnan().all()
    for block in compiled:
        block.moe.nonfinite_policy = "collect"
    compiled.train()
    compiled(bad)
    compiled(x)
    assert all(block.moe.nonfinite.found for block in compiled)
    for block in compiled:
        take_largest([block.moe.nonfinite], x.device)
    compiled(x)
    assert not any(block.moe.nonfinite.found for block in compiled)


def test_another_loss_scale_counts_for_a_graph_that_exists():
    """As when a strategy connects layers to its own."""
    eager, compiled = pair()
    for x in batches(5, 5):
        for model in (eager, compiled):
            shared = LossScale()
            for block in model:
                block.moe.loss_scale = shared
        assert_same(eager, compiled, run(compiled, x), run(eager, x), 1e-12)
    assert graphs() == 1


def test_terms_can_not_be_taken_and_are_attached():
    _, compiled = pair()
    (x,) = batches(5)
    compiled(x)
    with pytest.raises(ConfigError, match="fullgraph=True"):
        moe_losses(compiled)


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        ({"router": "switch"}, "random numbers"),
        ({"router": "soft"}, "random numbers, or doesn't choose"),
        ({"activation": "clamped_swiglu"}, "no fused backward"),
        ({"expert": lambda d, f: nn.Linear(d, d)}, "modules"),
    ],
)
def test_what_is_not_traced_is_refused_by_name(moe, reason):
    defaults = {"load_balancing": None, "z_loss": None}
    eager, compiled = pair(blocks=1, **defaults, **moe)
    (x,) = batches(5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        compiled(x)
    # Without fullgraph=True they are opaque, as ever.
    again = copy.deepcopy(eager)
    again[0].compile(backend="aot_eager")
    for model in (eager, again):
        model.eval()
    torch.testing.assert_close(again(x), eager(x), rtol=1e-12, atol=1e-12)


def test_masks_observers_and_hooks_are_refused():
    """Also by a layer that was traced before it got them."""
    _, compiled = pair("eager", blocks=1)
    moe = compiled[0].moe
    (x,) = batches(5)
    compiled(x)
    traced = torch.compile(moe, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="mask="):
        traced(x, mask=torch.ones(2, 5, dtype=torch.bool))
    handle = moe.register_routing_observer(lambda *_: None)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="observers"):
        compiled(x)
    handle.remove()
    compiled(x)
    moe.router.register_forward_hook(lambda *_: None)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="hooks"):
        compiled(x)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
PARTS = ("experts", "layer")


@pytest.mark.parametrize(
    ("part", "kind"),
    [*(("router", kind) for kind in HOOKS), *((part, HOOKS[i]) for part in PARTS for i in (0, 2))],
)
def test_hooks_that_come_and_go_are_called(part, kind):
    """Dynamo by itself would never call those of a module that is in a graph already."""
    torch.manual_seed(0)
    eager = nn.Sequential(*(Block() for _ in range(2))).double()
    compiled = copy.deepcopy(eager)
    trace_layers(compiled)
    for block in compiled:
        block.compile(backend="eager")
    first, second, third, fourth = batches(5, 6, 7, 8)
    run(compiled, first)
    calls: list[nn.Module] = []
    moe = compiled[1].moe
    module = moe if part == "layer" else getattr(moe, part)
    handle = getattr(module, f"register_{kind}")(lambda module, *_: calls.append(module))
    assert_same(eager, compiled, run(compiled, second), run(eager, second), 1e-12)
    assert calls == [module]
    handle.remove()
    known = graphs()
    assert_same(eager, compiled, run(compiled, third), run(eager, third), 1e-12)
    assert calls == [module]
    if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 11):
        # Torch 2.11 doesn't notice that a dict of hooks is empty again: it goes on with a graph
        # that breaks at the layer.
        assert graphs() == known, "the graph of before serves again"
    module._forward_hooks = OrderedDict()  # as Lightning replaces them
    watch_replaced_hooks(compiled)
    module.register_forward_hook(lambda module, *_: calls.append(module))
    assert_same(eager, compiled, run(compiled, fourth), run(eager, fourth), 1e-12)
    assert calls == [module] * 2


def test_operators_are_what_they_declare():
    ops = getattr(torch.ops, runtime_ops.NAMESPACE)
    grad = torch.randn(5, 8)
    factor, room = (torch.tensor([x], dtype=torch.float64) for x in (3.0, 0.7))
    weights, logits = torch.rand(5, 2, requires_grad=True), torch.randn(5, 4)
    ids = torch.rand(5, 4).argsort(dim=1)[:, :2]
    for operator, arguments in (
        (ops.scale_for, (grad, factor, torch.tensor(1.0))),
        (ops.add_load, (torch.zeros(4, dtype=torch.int64), torch.arange(4))),
        (ops.checked, (weights, logits)),
        (ops.within_capacity, (ids, None, logits.softmax(dim=1), room, "rank", "position")),
        (ops.within_capacity, (ids, ids > 0, logits.softmax(dim=1), room, "rank", "score")),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_the_factor_that_graphs_read_follows_the_value():
    scale, weight = LossScale(), torch.tensor(2.0, requires_grad=True)
    factor = scale.factor
    for in_graphs, inside, after in ((False, 1.0, 1.0), (True, 5.0, 1.0)):
        scale.in_graphs = in_graphs
        loss = weight * 3
        seen = []
        with scale.of(loss):
            weight.register_hook(lambda _, seen=seen: seen.append(float(factor)))
            (loss * 5).backward()
        assert seen[-1] == inside
        assert factor is scale.factor
        assert float(factor) == after


def test_only_fullgraph_takes_single_trained_experts_into_a_graph():
    """There their gradients cost as much as those of all."""
    eager, _ = pair()
    compiled = copy.deepcopy(eager)
    trace_layers(compiled)
    for model in (eager, compiled):
        for block in model:
            experts = block.moe.experts
            train_rows(experts, experts.stack_names, experts.local_ids, [1, 3])
    for block in compiled:
        block.compile(backend="aot_eager")
    (x,) = batches(5)
    torch.testing.assert_close(run(compiled, x), run(eager, x))
    assert counters["graph_break"]


def test_observers_that_come_and_go_need_no_new_graph():
    _, (block, _) = pair()
    block.moe.reference = Reference(block.moe)  # a strategy makes one
    found = []
    for _ in range(3):
        handle = block.moe.register_routing_observer(lambda *_: None)
        for x in batches(5):
            block(x).sum().backward()
        found.append(graphs())
        handle.remove()
    assert found == [1, 1, 1]


def test_single_trained_experts():
    eager, compiled = pair()
    for model in (eager, compiled):
        for block in model:
            experts = block.moe.experts
            train_rows(experts, experts.stack_names, experts.local_ids, [1, 3])
    for x in batches(5, 7):
        y = run(compiled, x.detach().requires_grad_())
        torch.testing.assert_close(y, run(eager, x))
        for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, msg=name)
    assert graphs() > 0
