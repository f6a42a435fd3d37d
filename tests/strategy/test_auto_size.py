"""expert_parallel_size="auto" looks at every layer, wherever the model is built."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from strategy.models import D_MODEL, Case, Net, build_net
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.strategy import auto_size

Outcome = tuple[int, list[int], dict[str, Tensor]]


class Expert(nn.Linear):
    """An expert that is a module, with a buffer."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model)
        self.register_buffer("scale", torch.ones(()))


class Late(Net):
    """Builds some layers in ``__init__``, the others in ``configure_model``."""

    def __init__(self, case: Case, in_init: int, modules: bool) -> None:
        super().__init__(case)
        self.modules_ = modules
        self.layers = nn.ModuleList()
        self.calls = 0
        self.build(in_init)

    def build(self, count: int) -> None:
        """Layers up to the ``count``th; each from a seed of its own, wherever it is built."""
        for i in range(len(self.layers), count):
            torch.manual_seed(i)
            self.layers.append(self.make(self.case.num_experts[i]))

    def make(self, experts: int) -> MoE:
        if self.modules_:
            return MoE(D_MODEL, None, experts, 2, expert=Expert)
        return MoE(D_MODEL, 20, experts, 2, bias=True)

    def configure_model(self) -> None:
        self.calls += 1
        self.build(len(self.case.num_experts))
        torch.manual_seed(9)
        self.net = build_net((), (0.0, 0.0))
        self.net["moes"] = self.layers


def built(case: Case, in_init: int, modules: bool = False) -> Outcome:
    """The size that "auto" took, the local experts of each layer, and the trained weights."""
    pl.seed_everything(7, verbose=False)
    module = Late(case, in_init, modules)
    trainer = make_trainer(case)
    trainer.fit(module)
    assert module.calls == 1
    assert module.net is not None
    local = [layer.num_local_experts for layer in module.layers]
    return trainer.strategy.expert_mesh.ep_size, local, whole_weights(module.net)


class Written(Late):
    """Writes to each layer's experts as soon as they are built."""

    def make(self, experts: int) -> MoE:
        layer = super().make(experts)
        with torch.no_grad():
            layer.experts.up_proj.mul_(2)
        return layer


def written_early(case: Case) -> Any:
    """The error for weights that would be lost."""
    try:
        make_trainer(case).fit(Written(case, 0, False))
    except TopologyError as error:
        return str(error)
    return None


def built_by_memory(case: Case, memory: list[int], kind: type[Late], in_init: int) -> Any:
    """The size with so many bytes on each rank's device, what was said, and the trained weights."""
    pl.seed_everything(7, verbose=False)
    said: list[str] = []
    module = kind(case, in_init, False)
    trainer = make_trainer(case)
    with (
        mock.patch.object(auto_size, "device_memory", return_value=memory[trainer.global_rank]),
        mock.patch.object(auto_size, "rank_zero_info", said.append),
    ):
        trainer.fit(module)
    assert module.net is not None
    local = [layer.num_local_experts for layer in module.layers]
    return trainer.strategy.expert_mesh.ep_size, local, said, whole_weights(module.net)


class Copied(Late):
    """Keeps a copy of a layer."""

    def configure_model(self) -> None:
        super().configure_model()
        self.copied = copy.deepcopy(self.layers[0]).requires_grad_(False)


@pytest.mark.parametrize(
    ("memory", "size"), [([10**9] * 4, 1), ([120_000] * 4, 2), ([10**9, 10**9, 10**9, 9], 4)]
)
@pytest.mark.parametrize("in_init", [0, 1, 2])
def test_the_smallest_size_that_fits_on_all_ranks(
    memory: list[int], size: int, in_init: int, rank_pool
) -> None:
    """Trains as with that size given as a number."""
    case = Case(world=4, ep="auto", num_experts=(8, 4), steps=2, in_configure_model=True)
    given = rank_pool.run(built, 4, replace(case, ep=size), in_init)
    outcomes = rank_pool.run(built_by_memory, 4, case, memory, Late, in_init)
    for (ep_size, local, said, weights), (_, _, expected) in zip(outcomes, given, strict=True):
        assert (ep_size, local) == (size, [8 // size, 4 // size])
        assert len(said) == 1
        assert f"'auto' is {size}, the {'largest' if size == 4 else 'smallest'} that" in said[0]
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize(("extra", "size"), [({}, 2), ({"tokens_per_rank": 10}, 4)])
def test_buffers_of_the_exchange_need_room_where_tokens_are_known(
    extra: dict[str, int], size: int, rank_pool
) -> None:
    """Experts on two ranks fit, but not with the buffers; then it is the largest size, as ever."""
    case = Case(4, "auto", num_experts=(8, 4), steps=1, in_configure_model=True, extra=extra)
    for ep_size, _, said, _ in rank_pool.run(built_by_memory, 4, case, [120_000] * 4, Late, 0):
        assert ep_size == size
        assert ("buffers for the exchange of tokens" in said[0]) == bool(extra)
        assert ("activations may not fit" in said[0]) == bool(extra)


def counted_as_exact(case: Case) -> bool:
    """Whether the buffers of all layers were counted as those of exact ones."""
    with (
        mock.patch.object(auto_size, "device_memory", return_value=10**9),
        mock.patch.object(auto_size, "buffers_at", wraps=auto_size.buffers_at) as counted,
    ):
        make_trainer(case).fit(Late(case, 0, False))
    exact: bool = counted.call_args.kwargs["exact"]
    return exact


@pytest.mark.parametrize("exact", [False, True])
def test_buffers_are_those_of_the_option_exact(exact: bool, rank_pool) -> None:
    extra = {"tokens_per_rank": 10, "exact": exact}
    case = Case(2, "auto", num_experts=(4,), steps=1, in_configure_model=True, extra=extra)
    assert rank_pool.run(counted_as_exact, 2, case) == [exact] * 2


def saved(case: Case, path: str) -> dict[str, Tensor]:
    """Weights of a checkpoint that a run has saved."""
    pl.seed_everything(3, verbose=False)
    module, trainer = Net(case), make_trainer(case)
    trainer.fit(module)
    trainer.save_checkpoint(path)
    assert module.net is not None
    return whole_weights(module.net)


def starts_from(case: Case, path: str) -> Any:
    """The size where weights are loaded while the model is built, and the weights at the start."""
    module = Loads(case)
    module.path = path
    trainer = make_trainer(case, max_steps=0)
    with mock.patch.object(auto_size, "device_memory", return_value=10**9):
        trainer.fit(module)
    assert module.net is not None
    return trainer.strategy.expert_mesh.ep_size, whole_weights(module.net)


class Loads(Net):
    """Starts from a checkpoint."""

    path: str

    def configure_model(self) -> None:
        super().configure_model()
        load_weights(self.path, self)


def test_weights_are_loaded_for_the_size_that_fits(rank_pool, tmp_path) -> None:
    case = Case(num_experts=(4, 4), steps=1, in_configure_model=True)
    (expected,) = rank_pool.run(saved, 1, case, str(tmp_path / "saved"))
    case = replace(case, world=2, ep="auto")
    for size, weights in rank_pool.run(starts_from, 2, case, str(tmp_path / "saved")):
        assert size == 1
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name


class WrittenByData(Late):
    """Initialises one expert anew, as is common, past autograd's count of writes."""

    def configure_model(self) -> None:
        super().configure_model()
        self.layers[-1].experts.down_proj.data[-1].normal_(std=0.02)


class Moved(Late):
    """Swaps two rows of an expert, which leaves the sum of its bits as it was."""

    def configure_model(self) -> None:
        super().configure_model()
        weight = self.layers[0].experts.up_proj.data
        weight[0] = weight[0].flip(0)


class OnOneRank(Late):
    """Writes to an expert that only one rank has."""

    def configure_model(self) -> None:
        super().configure_model()
        if 0 in self.layers[0].experts.local_ids:
            self.layers[0].experts.up_bias.data[0] = 1.0


@pytest.mark.parametrize("kind", [Copied, Written, WrittenByData, Moved, OnOneRank])
def test_a_size_that_would_lose_something_is_not_taken(kind: type[Late], rank_pool) -> None:
    case = Case(world=2, ep="auto", num_experts=(4, 4), steps=1, in_configure_model=True)
    for ep_size, local, said, _ in rank_pool.run(built_by_memory, 2, case, [10**9] * 2, kind, 0):
        assert (ep_size, local) == (2, [2, 2])
        assert "is 2, although 1 would fit" in said[0]


class Marked(Late):
    """Says something of parameters and experts, which must last."""

    def configure_model(self) -> None:
        super().configure_model()
        experts = self.layers[0].experts
        experts.up_bias.no_weight_decay = True
        self.alias = experts.down_proj
        self.calls_of_hooks = [0, 0]
        experts.up_proj.register_hook(lambda _: self.count(0))
        experts.register_forward_hook(lambda *_: self.count(1))

    def count(self, which: int) -> None:
        self.calls_of_hooks[which] += 1


def marked(case: Case, in_init: bool) -> Any:
    """What is left of it after training with the size that fits, or with the one given."""
    module = Marked(case, 2 if in_init else 0, False)
    trainer = make_trainer(case)
    with mock.patch.object(auto_size, "device_memory", return_value=10**9):
        trainer.fit(module)
    experts = module.layers[0].experts
    return (
        trainer.strategy.expert_mesh.ep_size,
        experts.up_bias.no_weight_decay,
        module.alias is experts.down_proj,
        module.calls_of_hooks,
    )


@pytest.mark.parametrize("in_init", [False, True])
@pytest.mark.parametrize(("ep", "size"), [("auto", 1), (2, 2)])
def test_hooks_and_marks_last(ep: Any, size: int, in_init: bool, rank_pool) -> None:
    case = Case(2, ep, num_experts=(4, 4), steps=2, in_configure_model=True)
    for found in rank_pool.run(marked, 2, case, in_init):
        assert found == (size, True, True, [2, 2])


def trained_again(case: Case) -> Any:
    """Sizes of a fit and of a later one with "auto", which the memory would allow to be 1."""
    module = Late(case, 2, False)
    sizes = []
    for ep in (2, "auto"):
        trainer = make_trainer(replace(case, ep=ep))
        with mock.patch.object(auto_size, "device_memory", return_value=10**9):
            trainer.fit(module)
        sizes.append(trainer.strategy.expert_mesh.ep_size)
    return sizes


def test_a_sharded_model_keeps_its_size(rank_pool) -> None:
    case = Case(2, 2, num_experts=(4, 4), steps=1, in_configure_model=True)
    assert rank_pool.run(trained_again, 2, case) == [[2, 2]] * 2


@pytest.mark.parametrize(
    ("world", "experts", "size", "modules"),
    [
        (2, (4, 5), 1, False),
        (2, (6, 4), 2, False),
        (4, (4, 6), 2, False),
        (4, (6, 4), 2, False),
        (4, (8, 4, 6), 2, True),
        (4, (4, 6, 5), 1, True),
    ],
)
def test_every_layer_counts(
    world: int, experts: tuple[int, ...], size: int, modules: bool, rank_pool
) -> None:
    """Built in ``__init__`` or not, one by one or not: the same size, and the same numbers."""
    case = Case(world=world, ep="auto", num_experts=experts, steps=2, in_configure_model=True)
    whole = rank_pool.run(built, world, case, len(experts), modules)
    for in_init in (0, 1):
        outcomes = rank_pool.run(built, world, case, in_init, modules)
        for expected, (ep_size, local, weights) in zip(whole, outcomes, strict=True):
            assert ep_size == expected[0] == size
            assert local == expected[1] == [e // size for e in experts]
            assert weights.keys() == expected[2].keys()
            for name, value in expected[2].items():
                assert torch.equal(weights[name], value), name


def test_weights_that_would_be_lost(rank_pool) -> None:
    case = Case(world=4, ep="auto", num_experts=(4, 6), in_configure_model=True)
    for message in rank_pool.run(written_early, 4, case):
        assert "chose 4 for a layer of 4 experts, but a later layer of 6" in message
        assert "Pass expert_parallel_size=2" in message
