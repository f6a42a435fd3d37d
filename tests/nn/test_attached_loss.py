"""Terms that act by themselves equal terms added by hand, from the reference's formulas."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, moe_losses
from lightning_fastmoe.nn.attached_loss import LossScale
from lightning_fastmoe.ops import reference

BALANCE, Z = 0.3, 0.2


class Model(nn.Module):
    """Two layers with something between, in fp64; remembers what reached each router."""

    def __init__(self, **kwargs):
        super().__init__()
        coefficients = {"load_balancing": BALANCE, "z_loss": Z, **kwargs}
        self.first = MoE(5, 3, 4, 2, **coefficients)
        self.dense = nn.Linear(5, 5)
        self.second = MoE(5, 4, 3, 1, activation="gelu", **coefficients)
        self.scale = LossScale()
        self.first.loss_scale = self.second.loss_scale = self.scale
        self.double()
        self.routed = []
        for layer in (self.first, self.second):
            layer.router.register_forward_pre_hook(
                lambda router, args: self.routed.append((router, args[0]))
            )

    def forward(self, x):
        self.routed.clear()
        return self.second(torch.tanh(self.dense(self.first(x))) + x)

    def terms(self):
        """Coefficient times term of the last pass, by plain formulas and a graph of their own."""
        balance, z = 0.0, 0.0
        for router, x in self.routed:
            logits = x @ router.weight.T
            scores, _, ids = reference.softmax_top_k(logits, router.top_k, normalize=False)
            balance = balance + BALANCE * reference.load_balancing_loss(scores, ids)
            z = z + Z * reference.z_loss(logits)
        return {"load_balancing": balance, "z_loss": z}


def make(**kwargs):
    torch.manual_seed(0)
    return Model(**kwargs)


def batches(n=1):
    torch.manual_seed(1)
    return [torch.randn(7 + i, 5, dtype=torch.float64, requires_grad=True) for i in range(n)]


def task(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def grads(model, *inputs):
    tensors = [*inputs, *model.parameters()]
    found = [t.grad for t in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


def by_hand(xs, factor=1.0, names=("load_balancing", "z_loss")):
    """The gradients with the terms added by hand, for all of ``xs``, each loss times ``factor``."""
    model = make(load_balancing=0, z_loss=0)
    for x in xs:
        loss = task(model(x))
        terms = model.terms()
        ((loss + sum(terms[name] for name in names)) * factor).backward()
    return grads(model, *xs)


def assert_close(got, want):
    assert all(g is not None for g in got)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_terms_matter():
    """Else every comparison below would hold without them."""
    (x,) = batches()
    with_terms, without = by_hand([x]), by_hand([x], names=())
    changed = [(a - b).norm() / b.norm() for a, b in zip(with_terms, without, strict=True)]
    names = ["x", *(name for name, _ in make().named_parameters())]
    change = dict(zip(names, changed, strict=True))
    assert min(change["first.router.weight"], change["second.router.weight"], change["x"]) > 1e-2
    one = [by_hand([x], names=(name,)) for name in ("load_balancing", "z_loss")]
    for single in one:
        assert (single[0] - with_terms[0]).norm() > 1e-3


def test_a_plain_backward_adds_the_attached_gradient():
    model, (x,) = make(), batches()
    task(model(x)).backward()
    assert_close(grads(model, x), by_hand([x]))


@pytest.mark.parametrize("factor", [1024 / 3, 1e-3, -1.0])
@pytest.mark.parametrize("how", ["watch", "of"])
def test_attached_gradients_follow_the_scale_of_the_loss(factor, how):
    model, (x,) = make(), batches()
    loss = task(model(x))
    if how == "watch":
        model.scale.watch(loss)
        (loss * factor).backward()
    else:
        with model.scale.of(loss):
            (loss * factor).backward()
        assert model.scale.value is None
    assert_close(grads(model, x), by_hand([x], factor))


def test_without_a_watch_the_factor_is_one_again():
    model, (x,) = make(), batches()
    loss = task(model(x))
    with model.scale.of(loss):
        (loss * 8).backward()
    grads(model, x)
    task(model(x)).backward()
    assert_close(grads(model, x), by_hand([x]))


def test_of_forgets_the_factor_even_after_an_error():
    scale, loss = LossScale(), torch.ones((), requires_grad=True) * 2

    def fail():
        with scale.of(loss):
            (loss * 8).backward()
            assert scale.value.item() == 8
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert scale.value is None


def test_the_watched_loss_nearest_to_the_layers_counts():
    model, (x,) = make(), batches()
    loss = task(model(x))
    model.scale.watch(loss)
    shared = loss / 4
    with model.scale.of(shared):
        (shared * 64).backward()
    assert_close(grads(model, x), by_hand([x], 16.0))


@pytest.mark.parametrize("forwards_first", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1024 / 2])
def test_accumulation_over_micro_batches(forwards_first, factor):
    model, xs = make(), batches(2)
    if forwards_first:
        losses = [task(model(x)) for x in xs]
        for loss in losses:
            model.scale.watch(loss)
            (loss * factor).backward()
    else:
        for x in xs:
            loss = task(model(x))
            model.scale.watch(loss)
            (loss * factor).backward()
    assert_close(grads(model, *xs), by_hand(xs, factor))


def test_two_passes_in_one_graph():
    """Not an average: each pass has its own terms, as if added by hand twice."""
    model, xs = make(), batches(2)
    (task(model(xs[0])) + task(model(xs[1]))).backward()
    assert_close(grads(model, *xs), by_hand(xs))


def test_two_backward_passes_through_one_graph():
    model, (x,) = make(), batches()
    loss = task(model(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(grads(model, x), by_hand([x], 2.0))


def test_factors_that_are_powers_of_two_change_no_bit():
    torch.manual_seed(0)
    layer, x = MoE(8, 16, 4), torch.randn(9, 8, requires_grad=True)
    found = []
    for factor in (1.0, 2.0**16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(x).float().square().mean()
        with layer.loss_scale.of(loss):
            (loss * factor).backward()
        found.append([g / factor for g in grads(layer, x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("factor", [1.0, 1024 / 3])
def test_taken_terms_are_counted_once(factor):
    model, (x,) = make(), batches()
    y = model(x)
    terms = moe_losses(model)
    want = model.terms()
    assert terms.keys() == want.keys()
    for name in terms:
        torch.testing.assert_close(terms[name], want[name], rtol=1e-12, atol=0.0)
    loss = task(y) + sum(terms.values())
    model.scale.watch(loss)
    (loss * factor).backward()
    assert_close(grads(model, x), by_hand([x], factor))


def test_taken_terms_have_no_effect_of_their_own():
    model, (x,) = make(), batches()
    y = model(x)
    moe_losses(model)
    task(y).backward()
    assert_close(grads(model, x), by_hand([x], names=()))


def test_one_of_the_taken_terms_can_be_added():
    model, (x,) = make(), batches()
    y = model(x)
    (task(y) + moe_losses(model)["z_loss"]).backward()
    assert_close(grads(model, x), by_hand([x], names=("z_loss",)))


def test_terms_of_one_layer_can_be_taken():
    model, (x,) = make(), batches()
    y = model(x)
    (task(y) + sum(moe_losses(model.first).values())).backward()  # second acts by itself
    assert_close(grads(model, x), by_hand([x]))


def test_terms_are_summed_over_passes_and_given_once():
    model, xs = make(), batches(2)
    outputs, want = [], {"load_balancing": 0.0, "z_loss": 0.0}
    for x in xs:
        outputs.append(model(x))
        want = {name: want[name] + value.item() for name, value in model.terms().items()}
    got = {name: value.item() for name, value in moe_losses(model).items()}
    assert got == pytest.approx(want, rel=1e-12)
    assert moe_losses(model) == {}
    task(model(xs[0])).backward()
    assert moe_losses(model) == {}  # that pass is over


def test_an_older_pass_that_is_over_is_not_given():
    model, xs = make(), batches(2)
    task(model(xs[0])).backward()
    y = model(xs[1])
    want = model.terms()
    terms = moe_losses(model)
    for name in want:
        torch.testing.assert_close(terms[name], want[name], rtol=1e-12, atol=0.0)
    del y


def test_last_losses_are_plain_values_without_coefficients():
    model, (x,) = make(), batches()
    model(x)
    got = [{k: v.item() for k, v in m.last_losses.items()} for m in (model.first, model.second)]
    want = model.terms()
    assert sum(values["load_balancing"] for values in got) * BALANCE == pytest.approx(
        want["load_balancing"].item(), rel=1e-12
    )
    assert sum(values["z_loss"] for values in got) * Z == pytest.approx(
        want["z_loss"].item(), rel=1e-12
    )
    assert not any(v.requires_grad for v in model.first.last_losses.values())


def test_evaluation_has_no_terms():
    model, (x,) = make().eval(), batches()
    y = model(x)
    assert moe_losses(model) == {}
    task(y).backward()
    assert_close(grads(model, x), by_hand([x], names=()))
    assert model.first.last_losses == {}


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ({"load_balancing": 0.0}, ("z_loss",)),
        ({"z_loss": 0.0}, ("load_balancing",)),
        ({"load_balancing": 0.0, "z_loss": 0.0}, ()),
    ],
)
def test_a_coefficient_of_zero_switches_a_term_off(off, left):
    model, (x,) = make(**off), batches()
    task(model(x)).backward()
    assert_close(grads(model, x), by_hand([x], names=left))
    y = model(x)
    assert tuple(moe_losses(model)) == left
    assert y.requires_grad


class _Checkpointed(Model):
    use_reentrant = True

    def forward(self, x):
        self.routed.clear()
        h = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        h = torch.tanh(self.dense(h)) + x
        return checkpoint(self.second, h, use_reentrant=self.use_reentrant)


def checkpointed(use_reentrant):
    torch.manual_seed(0)
    model = _Checkpointed()
    model.use_reentrant = use_reentrant
    return model


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1024 / 3])
def test_activation_checkpointing_changes_no_bit(use_reentrant, factor):
    (x,) = batches()
    found = []
    for model in (make(), checkpointed(use_reentrant)):
        calls = []
        for layer in (model.first, model.second):
            layer.register_routing_observer(lambda layer, _, calls=calls: calls.append(layer))
        loss = task(model(x))
        model.scale.watch(loss)
        (loss * factor).backward()
        assert calls == [model.first, model.second]
        found.append(grads(model, x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert_close(found[1], by_hand([x], factor))


def test_terms_can_be_taken_from_a_checkpoint_that_is_not_reentrant():
    model, (x,) = checkpointed(use_reentrant=False), batches()
    y = model(x)
    (task(y) + sum(moe_losses(model).values())).backward()
    assert_close(grads(model, x), by_hand([x]))


def test_terms_can_not_be_taken_from_a_reentrant_checkpoint():
    model, (x,) = checkpointed(use_reentrant=True), batches()
    y = model(x)
    with pytest.raises(ConfigError, match="'first'.*re-entrant.*use_reentrant=False"):
        moe_losses(model)
    task(y).backward()
    assert_close(grads(model, x), by_hand([x]))
    model.use_reentrant = False
    y = model(x)
    assert set(moe_losses(model)) == {"load_balancing", "z_loss"}


def test_a_replay_leaves_the_values_of_the_pass_alone():
    model, xs = checkpointed(use_reentrant=True), batches(2)
    first = model(xs[0])
    model(xs[1])
    noted = {name: value.clone() for name, value in model.first.last_losses.items()}
    task(first).backward()
    assert model.first.last_losses == noted
    model.eval()(xs[0])
    assert model.first.last_losses == noted


@pytest.mark.parametrize("end", ["dropped", "backward"])
def test_nothing_outlives_its_graph(end):
    model, (x,) = make(), batches()
    gc.disable()  # reference counts alone must do
    try:
        y = model(x)
        refs = [*model.first.balancing._attached._alive, *model.second.balancing._attached._alive]
        assert len(refs) == 2
        assert all(ref() is not None for ref in refs)
        if end == "backward":
            task(y).backward()
        del y
        model.routed.clear()
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()
    assert moe_losses(model) == {}


def test_passes_do_not_pile_up():
    model, (x,) = make(), batches()
    for _ in range(10):
        model(x)
    assert len(model.first.balancing._attached._alive) <= 2


def two_ways(
    differentiate: Callable[[MoE, Tensor, Tensor], list[Tensor]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients with attached losses, with none, and with losses added by hand."""
    results = []
    for load_balancing, by_hand in ((0.5, False), (0.0, False), (0.5, True)):
        torch.manual_seed(0)
        layer = MoE(12, 20, 4, top_k=2, load_balancing=load_balancing, z_loss=0.0).double()
        x = torch.randn(10, 12, dtype=torch.float64, requires_grad=True)
        quantity = layer(x).square().mean()
        if by_hand:
            quantity = quantity + sum(moe_losses(layer).values())
        results.append(differentiate(layer, x, quantity))
    attached, none, added = results
    return attached, none, added


def of_inputs(layer: MoE, x: Tensor, quantity: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(quantity, x)]


def of_experts(layer: MoE, x: Tensor, quantity: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(quantity, [x, *layer.experts.parameters()])]


def backward_to_inputs(layer: MoE, x: Tensor, quantity: Tensor) -> list[Tensor]:
    quantity.backward(inputs=[x])
    assert x.grad is not None
    return [x.grad]


@pytest.mark.parametrize("differentiate", [of_inputs, of_experts, backward_to_inputs])
def test_what_asks_for_no_gradient_of_the_router_has_none_of_the_losses(differentiate):
    """It differentiates something else than the loss of a step: an attack's, or a weight for it."""
    attached, none, added = two_ways(differentiate)
    for found, expected in zip(attached, none, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert any(not torch.allclose(a, b) for a, b in zip(none, added, strict=True))


def of_all(layer: MoE, x: Tensor, quantity: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(quantity, [x, *layer.parameters()])]


def backward(layer: MoE, x: Tensor, quantity: Tensor) -> list[Tensor]:
    quantity.backward()
    return [t.grad for t in (x, *layer.parameters()) if t.grad is not None]


def backward_to_all(layer: MoE, x: Tensor, quantity: Tensor) -> list[Tensor]:
    quantity.backward(inputs=[x, *layer.parameters()])
    return [t.grad for t in (x, *layer.parameters()) if t.grad is not None]


def of_inputs_and_then_backward(layer: MoE, x: Tensor, quantity: Tensor) -> list[Tensor]:
    torch.autograd.grad(quantity, x, retain_graph=True)
    return backward(layer, x, quantity)


@pytest.mark.parametrize(
    "differentiate", [of_all, backward, backward_to_all, of_inputs_and_then_backward]
)
def test_what_asks_for_gradients_of_the_router_has_the_losses(differentiate):
    attached, none, added = two_ways(differentiate)
    for found, expected in zip(attached, added, strict=True):
        torch.testing.assert_close(found, expected)
    assert any(not torch.allclose(a, b) for a, b in zip(none, added, strict=True))


def test_terms_can_be_taken_after_a_gradient_of_something_else():
    layer = MoE(12, 20, 4, top_k=2, load_balancing=0.5)
    x = torch.randn(10, 12, requires_grad=True)
    y = layer(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert set(moe_losses(layer)) == {"load_balancing", "z_loss"}
