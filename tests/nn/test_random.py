"""Random numbers by token number: against Python integers, and what they are independent of."""

from __future__ import annotations

import pytest
import torch
from nn.thread_ranks import on_ranks
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.router.random import normal_from_uniform, random_bits, uniform
from lightning_fastmoe.ops import reference_routers

RANDOM = ["noisy", "switch", "gshard", "dc"]


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
@pytest.mark.parametrize("stream", [0, 3])
def test_equals_reference(seed, stream):
    tokens = torch.tensor([0, 1, 2, 1000, 2**40])
    got = random_bits(seed, stream, tokens, 4)
    want = [
        [reference_routers.random_bits(seed, stream, int(t), c) for c in range(4)] for t in tokens
    ]
    assert got.tolist() == want
    numbers = uniform(seed, stream, tokens, 4)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [
        [reference_routers.uniform(seed, stream, int(t), c) for c in range(4)] for t in tokens
    ]


def test_known_answer():
    """Changing the generator would change the draws of every resumed run."""
    known = [[6376818399543353646, -3704646300439405987]]
    assert random_bits(42, 0, torch.tensor([7]), 2).tolist() == known


def test_uniform_and_independent():
    u = uniform(3, 0, torch.arange(20000), 5).double()
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    for values in (u, u[:, 0], uniform(3, 1, torch.arange(20000), 1).double()):
        counts = torch.histc(values, 50, 0, 1)
        expected = values.numel() / 50
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert chi_squared < 90  # 49 degrees of freedom: 1 in 3000
    columns = torch.cat([u, u.roll(1, 0), uniform(4, 0, torch.arange(20000), 5).double()], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(15)
    assert float(correlation.abs().max()) < 0.03


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    z = normal_from_uniform(uniform(3, 0, torch.arange(50000), 1)).double().squeeze()
    assert z.isfinite().all()
    assert abs(float(z.mean())) < 0.02
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    assert float((z.abs() < 1.96).double().mean()) == pytest.approx(0.95, abs=0.005)
    assert normal_from_uniform(torch.tensor([0.0, 1 - 2.0**-24])).isfinite().all()


def make(name, seed=0):
    torch.manual_seed(seed)
    options = {"init_std": 0.3} if name == "noisy" else {}
    return MoE(6, 8, 4, router=name, router_options=options, capacity_factor=None).double()


def choices(layer, parts, batch=None):
    """Routings of several passes, one after the other."""
    if batch is not None:
        layer.batch = batch
    seen = []
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    for part in parts:
        layer(part)
    return seen


def joined(routings):
    """What must be the same: logits with their noise, and the slots in use."""
    slots = [r.active if r.active is not None else torch.ones_like(r.expert_ids) for r in routings]
    return [torch.cat([r.logits for r in routings]), torch.cat(slots)]


@pytest.mark.parametrize("name", RANDOM)
def test_draws_do_not_depend_on_ranks_and_micro_batches(name):
    """Two steps of 24 tokens: one pass each, or ranks x micro-batches, also uneven ones."""
    torch.manual_seed(1)
    steps = torch.randn(2, 24, 6, dtype=torch.float64)
    whole = joined(choices(make(name), steps))
    for sizes in ((12, 12), (5, 19), (24,)):  # ranks
        for micros in (1, 2):
            # Token order: micro-batch, then rank, then place.
            parts = [step.chunk(micros) for step in steps]
            by_micro = [micro for step in parts for micro in step]
            split = [n // micros for n in sizes]
            split[-1] += 24 // micros - sum(split)

            layers = [make(name) for _ in sizes]  # threads share torch's global generator

            def run(rank, batch, by_micro=by_micro, split=split, layers=layers):
                return choices(layers[rank], [m.split(split)[rank] for m in by_micro], batch)

            found = on_ranks(run, len(sizes))
            order = [ranks[i] for i in range(2 * micros) for ranks in found]
            got = joined(order)
            assert torch.equal(got[1], whole[1])
            torch.testing.assert_close(got[0], whole[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_differ_between_steps_layers_and_seeds(name):
    x = torch.randn(64, 6, dtype=torch.float64)
    first = choices(make(name), [x, x])
    torch.manual_seed(0)
    pair = torch.nn.ModuleList([make(name), make(name, seed=5)])
    pair[1].router.load_state_dict(pair[0].router.state_dict())
    other = choices(pair[1], [x])[0]
    assert_different(first[0], first[1])
    assert_different(first[0], other)
    again = choices(make(name), [x])[0]
    for a, b in zip(joined([again]), joined([first[0]]), strict=True):
        assert torch.equal(a, b)


def assert_different(a, b):
    assert not all(torch.equal(x, y) for x, y in zip(joined([a]), joined([b]), strict=True))


@pytest.mark.parametrize("name", RANDOM)
def test_evaluation_draws_nothing(name):
    layer, x = make(name).eval(), torch.randn(9, 6, dtype=torch.float64)
    state = torch.get_rng_state()
    a, b = choices(layer, [x, x])
    assert torch.equal(a.logits, b.logits)
    assert a.active is None
    assert layer.router.tokens_seen.item() == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", RANDOM)
def test_the_state_dict_goes_on_where_training_stopped(name):
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    layer = make(name)
    want = choices(layer, x)[2]
    first, second = make(name), make(name)
    choices(first, x[:2])
    assert first.router.tokens_seen.item() == 18
    second.load_state_dict(first.state_dict())
    got = choices(second, x[2:])[0]
    for a, b in zip(joined([got]), joined([want]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_replay_draws_the_same_and_counts_once(name, use_reentrant):
    """Two passes, replayed in the opposite order, with something random before the layer."""
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)

    def run(wrap):
        layer = make(name)
        calls = []
        layer.router.register_forward_hook(lambda _, args, out: calls.append(out.logits.detach()))
        torch.manual_seed(3)

        def block(part):
            return layer(torch.nn.functional.dropout(part, 0.3))

        loss = sum((wrap(block, part) ** 2).sum() for part in x)
        grads = (
            torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
            if (not use_reentrant)
            else None
        )
        if grads is None:
            x.grad = None
            loss.backward()
            grads = [x.grad, *(p.grad for p in layer.parameters())]
        assert layer.router.tokens_seen.item() == 18
        return grads, calls

    want, plain = run(lambda block, part: block(part))
    got, calls = run(lambda block, part: checkpoint(block, part, use_reentrant=use_reentrant))
    assert len(calls) == 2 * len(plain) == 4
    assert torch.equal(calls[2], calls[1])
    assert torch.equal(calls[3], calls[0])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_replay_without_the_random_state_is_refused():
    layer, x = make("switch"), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(ConfigError, match="preserve_rng_state=True"):
        y.sum().backward()


@pytest.mark.parametrize("sizes", [(18,), (9, 9)])
@pytest.mark.parametrize("name", RANDOM)
def test_masked_tokens_take_no_numbers(name, sizes):
    """The tokens that a mask left draw what they draw without the others, on any ranks."""
    torch.manual_seed(1)
    x = torch.randn(2, 18, 6, dtype=torch.float64)
    mask = torch.rand(2, 18) < 0.4
    want = joined(
        choices(make(name), [part[~hidden] for part, hidden in zip(x, mask, strict=True)])
    )
    layers = [make(name) for _ in sizes]

    def run(rank, batch):
        layer, seen = layers[rank], []
        layer.batch = batch
        layer.register_routing_observer(lambda _, routing: seen.append(routing))
        for part, hidden in zip(x, mask, strict=True):
            layer(part.split(sizes)[rank], mask=hidden.split(sizes)[rank])
        return seen

    found = on_ranks(run, len(sizes))
    got = joined([seen[step] for step in range(2) for seen in found])
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    assert int(layers[0].router.tokens_seen) == int((~mask).sum())
