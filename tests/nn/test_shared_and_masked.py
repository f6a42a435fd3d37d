"""Shared experts, masks, and gpt-oss's activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nn.thread_ranks import on_ranks
from torch import nn

from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.nn import LocalDispatcher, MoE, SequentialSchedule
from lightning_fastmoe.nn.router import ROUTERS
from lightning_fastmoe.nn.router.losses import LOSSES
from lightning_fastmoe.ops import apply_activation, reference
from lightning_fastmoe.ops.activation import COMPOSED, Composed

D, E = 5, 4


def make(**kwargs):
    torch.manual_seed(0)
    layer = MoE(D, 3, E, **{"load_balancing": 0, "z_loss": 0, **kwargs}).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def tokens(*lead):
    torch.manual_seed(1)
    return torch.randn(*lead, D, dtype=torch.float64, requires_grad=True)


def assert_same(got, want, leaves):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------- shared experts


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_a_shared_expert_is_added_for_every_token(activation, bias, gate):
    layer = make(activation=activation, bias=bias, shared_expert=7, shared_expert_gate=gate)
    x = tokens(9)
    shared, e = layer.shared_expert, layer.experts
    ffn = shared.ffn
    routing = layer.router(x)
    want = reference.moe(
        x, routing.weights, routing.expert_ids, e.up_proj, e.down_proj, activation, e.up_bias,
        e.down_bias,
    )  # fmt: skip
    dense = reference.expert_ffn(
        x, ffn.up_proj, ffn.down_proj, activation, ffn.up_bias, ffn.down_bias
    )
    if gate:
        dense = dense / (1 + torch.exp(-x @ shared.gate.T))
    assert_same(layer(x), want + dense, [x, *layer.parameters()])
    assert len(list(shared.parameters())) == 2 + 2 * bias + gate


def test_a_shared_module_of_ones_own():
    linear = nn.Linear(D, D)
    layer, plain = make(shared_expert=linear), make()
    x = tokens(9)
    torch.testing.assert_close(layer(x), plain(x) + linear(x))


def test_a_shared_expert_leaves_the_routed_ones_as_they_start():
    a, b = make(), make(shared_expert=7)
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("shared", [None, 7])
def test_masked_tokens_skip_the_layer(chain, shared):
    layer, x = make(load_balancing=0.1, shared_expert=shared), tokens(3, 6)
    if chain:
        layer.schedule = SequentialSchedule(LocalDispatcher(E))
    mask = torch.rand(3, 6) < 0.4
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    got = layer(x, mask=mask)
    losses = dict(layer.last_losses)
    alone = layer(x[~mask])
    want = torch.zeros_like(x)
    want[~mask] = alone
    assert torch.equal(got, want)
    assert torch.equal(seen[0].expert_ids, seen[1].expert_ids)
    assert losses == layer.last_losses
    assert int(seen[0].routed_counts().sum()) == 2 * int((~mask).sum())
    leaves = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(alone.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_masked_tokens_get_their_value_and_others_are_unchanged():
    layer, x = make(), tokens(2, 3)
    mask = torch.tensor([[0, 1, 2], [3, 0, 1]])
    vector = torch.arange(5.0)
    got = layer(x, mask=mask, masked_values={1: 7.0, 2: vector})
    assert got[0, 1].tolist() == got[1, 2].tolist() == [7.0] * 5
    assert got[0, 2].tolist() == vector.tolist()
    assert not got[1, 0].any()
    torch.testing.assert_close(got[mask == 0], layer(x[mask == 0]))
    got = layer(x, mask=mask > 0, masked_values=vector)
    assert bool((got[mask > 0] == vector).all())


def test_a_masked_value_may_be_learned():
    layer, x = make(), tokens(4)
    value = torch.randn(D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    layer(x, mask=mask, masked_values=value).sum().backward()
    assert value.grad.tolist() == [2.0] * D
    assert not x.grad[mask].any()


@pytest.mark.parametrize("everything", [False, True])
def test_all_or_nothing_masked(everything):
    layer, x = make(load_balancing=0.1, z_loss=0.1), tokens(4)
    mask = torch.full((4,), everything)
    y = layer(x, mask=mask, masked_values=3.0)
    if everything:
        assert bool((y == 3).all())
    else:
        torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_masks_and_structures():
    class Sum(nn.Module):
        def forward(self, inputs):
            return {"sum": inputs["a"] + inputs["b"], "b": inputs["b"]}

    layer = MoE(D, num_experts=E, expert=lambda d: Sum()).double()
    a, b = tokens(4), tokens(4) * 3
    mask = torch.tensor([True, False, False, True])
    got = layer({"a": a, "b": b}, mask=mask, masked_values=1.0)
    torch.testing.assert_close(got["sum"][~mask], (a + b)[~mask])
    assert bool((got["sum"][mask] == 1).all())
    assert bool((got["b"][mask] == 1).all())


@pytest.mark.parametrize("name", ROUTERS)
def test_each_router_takes_a_mask_or_says_why_not(name):
    layer = MoE(D, 3, E, router=name)
    x, mask = torch.randn(2, 6, D), torch.rand(2, 6) < 0.5
    ids = torch.arange(12).view(2, 6)
    if name in ("soft", "expert_choice"):
        with pytest.raises(ConfigError, match="works on whole sequences"):
            layer(x, mask=mask, token_ids=ids)
    else:
        y = layer(x, mask=mask, token_ids=ids)
        assert not y[mask].any()
        assert y[~mask].any()


def padded(x, side, by=3):
    """``x (G, n, D)`` with ``by`` more tokens in each row, none of which a router could miss."""
    extra = torch.full((x.shape[0], by, x.shape[2]), 1e4, dtype=x.dtype)
    rows = [x, extra] if side == "right" else [extra, x]
    return torch.cat(rows, dim=1)


def assert_twins(got, want, x):
    """Two layers' (output, layer): the same values and gradients, those of the losses too."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-13)
    upstream = torch.randn_like(got[0])
    grads = [
        torch.autograd.grad(y, [x, *layer.parameters()], upstream, allow_unused=True)
        for y, layer in (got, want)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("over", ["rank", "global"])
@pytest.mark.parametrize("by", ["position", "score"])
@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "soft"])
def test_a_padded_batch_equals_the_batch(name, by, over):
    """Outputs, gradients, losses, drops, and what moves the balance bias, in two steps."""
    known = ROUTERS[name].losses
    own = {c: 0.1 for c in LOSSES if c in known}
    options = {"balance_bias": True} if name in ("softmax", "sigmoid") else {}
    if name == "expert_choice":  # refuses a mask over sequences
        options = {"over": "rank"}
    layer, twin = (
        make(
            router=name, router_options=options, capacity_factor=0.7, capacity_over=over,
            drop_by=by, **{"load_balancing": None, "z_loss": None, **own},
        )
        for _ in range(2)
    )  # fmt: skip
    x, seen = tokens(3, 6), []
    for one in (layer, twin):
        one.register_routing_observer(lambda _, routing: seen.append(routing))
    for step, side in enumerate(("left", "right")):
        rows = padded(x, side)
        hidden = rows.detach()[..., 0] == 1e4
        ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(step))
        seen.clear()
        got = layer(rows, mask=hidden, token_ids=ids)
        want = twin(x, token_ids=ids[~hidden].view(3, 6))
        assert not got[hidden].any()
        assert_twins((got[~hidden].view(3, 6, D), layer), (want, twin), x)
        for a, b in zip(seen[0], seen[1], strict=True):
            torch.testing.assert_close(a, b)
        assert layer.last_losses.keys() == own.keys()
        for loss in own:
            torch.testing.assert_close(layer.last_losses[loss], twin.last_losses[loss])
        for a, b in zip(layer.buffers(), twin.buffers(), strict=True):  # loads, tokens seen
            assert torch.equal(a, b)


@pytest.mark.parametrize("by", ["position", "score"])
def test_ranks_with_different_numbers_of_real_tokens(by):
    """Capacity, loads and the global term equal those of one process with all rows."""
    coefficients = {"global_balancing": 0.5, "sequence_balancing": 0.3}
    layers = [
        make(
            router="noisy", capacity_factor=0.6, capacity_over="global", drop_by=by, **coefficients
        )
        for _ in range(3)
    ]
    x, mask = tokens(4, 6), torch.rand(4, 6) < 0.2
    mask[2:, :4] = True

    def run(rank, batch):
        layer, rows, seen = layers[rank], slice(2 * rank, 2 * rank + 2), []
        layer.batch = batch
        layer.register_routing_observer(lambda _, routing: seen.append(routing))
        return layer(x[rows], mask=mask[rows]), seen[0]

    seen = []
    layers[2].register_routing_observer(lambda _, routing: seen.append(routing))
    want = layers[2](x, mask=mask)
    (y0, r0), (y1, r1) = on_ranks(run, 2)
    assert r0.kept.shape[0] > 2 * r1.kept.shape[0]
    assert not seen[0].kept.all()
    assert torch.equal(torch.cat([r0.kept, r1.kept]), seen[0].kept)
    assert torch.equal(r0.routed_counts() + r1.routed_counts(), seen[0].routed_counts())
    torch.testing.assert_close(torch.cat([y0, y1]), want)
    for name in coefficients:
        mean = (layers[0].last_losses[name] + layers[1].last_losses[name]) / 2
        torch.testing.assert_close(mean, layers[2].last_losses[name])


def test_packed_documents_are_balanced_as_sequences():
    """Documents of different lengths in one row, with padding, equal rows of their own."""
    lengths, n = (5, 1, 3), 5
    layer, twin = (make(sequence_balancing=0.3) for _ in range(2))
    documents = tokens(len(lengths), n)
    hidden = torch.arange(n) >= torch.tensor(lengths).unsqueeze(1)
    want = twin(documents, mask=hidden)
    row = torch.cat([documents[~hidden], torch.ones(2, D, dtype=torch.float64)])
    ids = torch.tensor([7] * 5 + [3] + [7] * 3 + [0, 0])
    padding = torch.arange(11) >= 9
    got = layer(row.unsqueeze(0), mask=padding.unsqueeze(0), sequence_ids=ids.unsqueeze(0))
    assert_twins((got[0, :9], layer), (want[~hidden], twin), documents)
    torch.testing.assert_close(layer.last_losses, twin.last_losses)
    other = make(sequence_balancing=0.3)
    other(row.unsqueeze(0), mask=padding.unsqueeze(0))
    difference = other.last_losses["sequence_balancing"] - twin.last_losses["sequence_balancing"]
    assert abs(float(difference)) > 1e-3


def test_rows_are_different_sequences_whatever_their_ids():
    layer, twin = (make(sequence_balancing=0.3) for _ in range(2))
    x = tokens(2, 6)
    layer(x, sequence_ids=torch.zeros(2, 6, dtype=torch.int32))
    twin(x)
    torch.testing.assert_close(layer.last_losses, twin.last_losses)


@pytest.mark.parametrize("name", ["soft", "expert_choice"])
def test_routers_of_whole_sequences_refuse_packed_ones(name):
    layer = MoE(D, 3, E, router=name)
    with pytest.raises(ConfigError, match=r"sequence_ids= says that rows hold several sequences"):
        layer(torch.randn(2, 6, D), sequence_ids=torch.zeros(2, 6, dtype=torch.int64))


@pytest.mark.parametrize("name", ["mask", "token_ids", "sequence_ids"])
def test_one_element_per_token(name):
    with pytest.raises(ShapeError, match=rf"{name} of shape \(3,\) for tokens of shape \(2, 3\)"):
        make()(tokens(2, 3), **{name: torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(ShapeError, match=rf"{name} of dtype torch.float32. It must be bool or"):
        make()(tokens(2, 3), **{name: torch.zeros(2, 3)})


def test_hash_routing_needs_ids():
    with pytest.raises(ConfigError, match=r"vocabulary ids.*token_ids=ids"):
        MoE(D, 3, E, router="hash")(torch.randn(3, D))


# -------------------------------------------------------------------------------- clamped SwiGLU


def test_clamped_swiglu_by_hand():
    h = torch.tensor([[0.0, 1.0, 9.0, -9.0, 2.0, -8.0, 9.0, 0.5]], dtype=torch.float64)
    gate, up = [0.0, 1.0, 7.0, -9.0], [2.0, -7.0, 7.0, 0.5]
    want = [
        g / (1 + torch.exp(torch.tensor(-1.702 * g, dtype=torch.float64))).item() * (u + 1)
        for g, u in zip(gate, up, strict=True)
    ]
    assert apply_activation(h, "clamped_swiglu").tolist()[0] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chain", [False, True])
def test_clamped_swiglu_in_a_layer(bias, chain):
    layer, x = make(activation="clamped_swiglu", bias=bias), tokens(9)
    if chain:
        layer.schedule = SequentialSchedule(LocalDispatcher(E))
    with torch.no_grad():
        layer.experts.up_proj *= 20  # so that both clamps bite
    e, routing = layer.experts, layer.router(x)
    h = torch.einsum("td,efd->tef", x, e.up_proj)
    assert bool((h[..., :3] > 7).any())
    assert bool((h[..., 3:].abs() > 7).any())
    want = reference.moe(
        x, routing.weights, routing.expert_ids, e.up_proj, e.down_proj, "clamped_swiglu",
        e.up_bias, e.down_bias,
    )  # fmt: skip
    assert_same(layer(x), want, [x, *layer.parameters()])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chain", [False, True])
def test_a_new_activation_needs_its_formula_alone(monkeypatch, gated, chain):
    def value(h):
        gate, up = h.chunk(2, dim=-1) if gated else (h, 1)
        return F.mish(gate) * up

    monkeypatch.setitem(COMPOSED, "new", Composed(gated, value))
    layer, x = make(activation="new", bias=True, shared_expert=7), tokens(9)
    if chain:
        layer.schedule = SequentialSchedule(LocalDispatcher(E))
    e, shared, routing = layer.experts, layer.shared_expert.ffn, layer.router(x)
    rows = []
    for t in range(9):
        up = shared.up_proj @ x[t] + shared.up_bias
        y = shared.down_proj @ value(up) + shared.down_bias
        for weight, i in zip(routing.weights[t], routing.expert_ids[t].tolist(), strict=True):
            up = e.up_proj[i] @ x[t] + e.up_bias[i]
            y = y + weight * (e.down_proj[i] @ value(up) + e.down_bias[i])
        rows.append(y)
    assert_same(layer(x), torch.stack(rows), [x, *layer.parameters()])
