"""One seed, one model, whichever experts a rank holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn import MoE, StackedExperts
from lightning_fastmoe.nn.experts import init
from lightning_fastmoe.nn.placement import Placement, equal_blocks, expert_placement


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(3, 5)
        self.first = MoE(5, 6, 4, bias=True)
        self.between = nn.Linear(5, 5)
        self.second = MoE(5, 2, 8, activation="gelu")
        self.after = nn.Linear(5, 3)


def build(seed=0, rank=0, ranks=1, remember=None):
    torch.manual_seed(seed)

    def rule(num_experts):
        return Placement(tuple(equal_blocks(num_experts, ranks)[rank]), remember)

    with expert_placement(rule):
        return Model()


def plain(seed=0):
    torch.manual_seed(seed)
    return Model()


def assert_slice(part, whole, rank, ranks):
    for name, value in part.named_parameters():
        full = dict(whole.named_parameters())[name]
        want = full.chunk(ranks)[rank] if ".experts." in name else full
        assert torch.equal(value, want), name


def test_same_seed_same_model():
    a, b, c = plain(0), plain(0), plain(1)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert name.endswith(("up_bias", "down_bias")) or not torch.equal(p, r), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_equal_the_whole_layer(ranks):
    whole = plain()
    for rank in range(ranks):
        part = build(rank=rank, ranks=ranks)
        assert part.first.num_local_experts == 4 // ranks
        assert part.second.experts.local_ids[0] == rank * 8 // ranks
        assert part.first.is_sharded is (ranks > 1)
        assert_slice(part, whole, rank, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_keep_equals_slices(ranks):
    whole = plain()
    for rank in range(ranks):
        part = plain()
        for layer in (part.first, part.second):
            each = layer.num_experts // ranks
            layer.experts.keep(range(rank * each, (rank + 1) * each))
            assert layer.num_local_experts == each
        assert_slice(part, whole, rank, ranks)


def test_keep_twice_takes_global_ids():
    whole, part = plain(), plain()
    part.second.experts.keep((1, 4, 6, 7))
    part.second.experts.keep((1, 6, 7))
    assert torch.equal(part.second.experts.up_proj, whole.second.experts.up_proj[[1, 6, 7]])
    part.second.experts.keep((6, 7))
    assert torch.equal(part.second.experts.up_proj, whole.second.experts.up_proj[6:8])


@pytest.mark.parametrize("ids", [(), (2, 1), (1, 1), (3, 4), (-1, 0)])
def test_ids_that_are_no_selection_are_refused(ids):
    with pytest.raises(TopologyError, match=r"ascending list of ids in \[0, 4\)"):
        plain().first.experts.keep(ids)


def test_an_expert_of_another_rank_can_not_be_kept():
    experts = plain().first.experts
    experts.keep((0, 1))
    with pytest.raises(TopologyError, match=r"Experts \[2\] are not on this rank"):
        experts.keep((1, 2))


def test_keep_frees_the_rest_and_keeps_requires_grad():
    experts = plain().first.experts
    experts.up_proj.requires_grad_(False)
    experts.keep((2,))
    assert [p.requires_grad for p in experts.parameters()] == [False, True, True, True]
    for parameter in experts.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


def test_placement_sees_the_finished_layers_and_ends_with_its_context():
    built = []
    model = build(ranks=2, remember=lambda layer, make: built.append((layer, make)))
    assert [layer for layer, _ in built] == [model.first, model.second]
    for layer, make in built:
        again = make((1,)).state_dict()
        assert all(torch.equal(again[n], p[1:2]) for n, p in layer.experts.named_parameters())
    assert not MoE(5, 6, 4).is_sharded


def test_local_dispatcher_and_no_placement_keep_all_experts():
    with expert_placement(lambda num_experts: Placement((0, 1))):
        assert MoE(5, 6, 4, dispatcher="local").num_local_experts == 4
    with expert_placement(lambda num_experts: None):
        assert MoE(5, 6, 4).num_local_experts == 4


def test_every_expert_and_parameter_starts_differently():
    torch.manual_seed(0)
    experts = MoE(6, 6, 3, activation="relu").experts  # (3, 6, 6) both
    flat = torch.cat([experts.up_proj, experts.down_proj]).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == 6


def test_initial_ranges():
    torch.manual_seed(0)
    experts = MoE(100, 25, 8, bias=True).experts
    # U(-b, b) with b = 1 / sqrt(fan_in), fan_in D = 100 and F = 25.
    for parameter, bound in ((experts.up_proj, 0.1), (experts.down_proj, 0.2)):
        assert 0.99 * bound < parameter.abs().max() <= bound
        assert abs(parameter.mean()) < 0.01 * bound
    assert not experts.up_bias.any()
    assert not experts.down_bias.any()
    experts = MoE(100, 25, 8, init_std=0.02).experts
    for parameter in (experts.up_proj, experts.down_proj):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
        assert parameter.abs().max() > 0.06


@pytest.mark.poisoned(False)  # torch.device's context knows torch.empty by identity
def test_meta_device_allocates_nothing_and_materialises_to_the_same_experts():
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = MoE(5, 6, 4, bias=True)
    assert all(p.is_meta for p in layer.parameters())
    torch.manual_seed(0)
    want = MoE(5, 6, 4, bias=True)
    layer.to_empty(device="cpu")
    layer.experts.reset_parameters()
    for (name, a), b in zip(
        layer.experts.named_parameters(), want.experts.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_initial_values_do_not_depend_on_the_default_dtype():
    kwargs = {"layer_seed": 7}
    want = StackedExperts(5, 3, 2, **kwargs).up_proj
    torch.set_default_dtype(torch.float64)
    try:
        got = StackedExperts(5, 3, 2, **kwargs).up_proj
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float64
    assert torch.equal(got.float(), want)


@pytest.mark.parametrize("std", [None, 0.02])
@pytest.mark.parametrize("cores", [1, 3, 8])
@pytest.mark.parametrize("bytes_at_once", [1, 1 << 30])
@pytest.mark.parametrize("target", ["bf16", "fp32", "fp32 transposed"])
def test_threads_draw_what_one_thread_draws(monkeypatch, cores, bytes_at_once, std, target):
    monkeypatch.setattr(init, "_WORTH_THREADS", 1)
    monkeypatch.setattr(init, "_cores", lambda: cores)
    monkeypatch.setattr(init, "_BYTES_AT_ONCE", bytes_at_once)
    ids = (0, 3, 4, 11, 5)
    with torch.inference_mode():  # which other threads are not in
        dtype = torch.bfloat16 if target == "bf16" else torch.float32
        drawn = torch.empty(len(ids), 7, 3, dtype=dtype)
        if target == "fp32 transposed":
            drawn = torch.empty(len(ids), 3, 7).transpose(1, 2)
        init.init_experts_(drawn, name="up", layer_seed=9, expert_ids=ids, fan_in=3, std=std)
    for expert_id, values in zip(ids, drawn, strict=True):
        expected, generator = torch.empty(7, 3), init.expert_generator(9, "up", expert_id)
        if std is None:
            expected.uniform_(-(3**-0.5), 3**-0.5, generator=generator)
        else:
            expected.normal_(0.0, std, generator=generator)
        assert torch.equal(values, expected.to(dtype)), expert_id


def test_no_thread_leaves_a_mode_that_makes_other_tensors(monkeypatch):
    monkeypatch.setattr(init, "_WORTH_THREADS", 1)
    monkeypatch.setattr(init, "_cores", lambda: 2)
    with FakeTensorMode():
        drawn = torch.empty(4, 7, 3)
        init.init_experts_(drawn, name="up", layer_seed=9, expert_ids=range(4), fan_in=3, std=0.1)
    assert isinstance(drawn, FakeTensor)


def test_one_id_for_each_slice():
    with pytest.raises(ValueError, match="zip"):
        init.init_experts_(
            torch.empty(2, 3), name="up", layer_seed=9, expert_ids=[0], fan_in=3, std=None
        )
