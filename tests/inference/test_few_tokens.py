"""Passes of few tokens, which copy only the experts that they chose."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from huggingface.sharding_runs import Run, make_model
from inference.offload_models import D_MODEL, KINDS, Blocks, poisoned
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.expert_cache import ExpertCache, runs
from lightning_fastmoe.inference.ring import ExpertRing, Stack
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.planning.few_tokens import are_few, expected_experts

CPU = torch.device("cpu")
EIGHT = {"num_local_experts": 8, "num_experts": 8}
PREFILL_AND_DECODE = (12, 1, 1, 2, 1, 30, 1, 0, 1, 3, 12, 12, 1)


def blocks(**options: Any) -> nn.Module:
    return Blocks({"num_experts": 8, **options}).eval()


def chosen_by(model: Any, *inputs: Any) -> list[list[set[int]]]:
    """For each input, for each layer in turn, the experts that its router chooses."""
    seen: list[set[int]] = []

    def look(module: nn.Module, args: Any) -> None:
        ids = args[1]
        if len(args) > 3:  # numbers of pairs
            ids = torch.tensor([e for e, count in enumerate(ids.tolist()) if count])
        seen.append(set(ids.flatten().tolist()))

    modules = [m for name, m in model.named_modules() if name.endswith("experts")]
    hooks = [module.register_forward_pre_hook(look) for module in modules]
    found = []
    with torch.inference_mode():
        for x in inputs:
            seen.clear()
            model(x)
            found.append(list(seen))
    for hook in hooks:
        hook.remove()
    return found


MORE_KINDS: dict[str, dict[str, Any]] = {
    **KINDS,
    "soft": {"router": "soft", "top_k": None},
    "composed": {"activation": "clamped_swiglu", "bias": True},
    "dropping": {"capacity_factor": 1.0},
}


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_the_same_bits(kind: str, slots: int) -> None:
    whole = kind in ("modules", "soft", "expert_choice")
    cache = None if whole or slots == 5 else 20_000
    model = blocks(**MORE_KINDS[kind])
    batches = [torch.randn(n, D_MODEL) for n in PREFILL_AND_DECODE]
    with torch.inference_mode():
        expected = [model(batch) for batch in batches]
        offloaded = offload_experts(model, "cpu", slots=slots, expert_cache=cache)
        poisoned(offloaded._ring)
        for batch, right in zip(batches, expected, strict=True):
            assert torch.equal(model(batch), right)
    statistics = offloaded.statistics
    assert (statistics.expert_misses > 0) == (not whole and kind != "few" and slots < 4)
    assert statistics.misses == 0
    offloaded.close()
    with torch.no_grad():
        assert torch.equal(model(batches[0]), expected[0])


@pytest.mark.parametrize("cache", [None, "20KB"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_models_of_transformers(name: str, cache: str | None) -> None:
    model = make_model(Run(name, sizes=EIGHT)).eval()
    prompt = torch.arange(3, 14).repeat(2, 1)
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    greedy["return_dict_in_generate"] = True
    with torch.inference_mode():
        expected = model.generate(prompt, **greedy)
        offloaded = offload_experts(model, "cpu", slots=1, expert_cache=cache)
        poisoned(offloaded._ring)
        for _ in range(2):  # a prompt after steps
            found = model.generate(prompt, **greedy)
            assert torch.equal(found.sequences, expected.sequences)
            assert all(map(torch.equal, found.logits, expected.logits))
    assert offloaded.statistics.expert_misses > 0
    assert (offloaded.statistics.expert_hits > 0) == (cache is not None)


@pytest.mark.parametrize("name", ["ours", "qwen3_moe", "gpt_oss"])
def test_the_bytes_are_those_of_distinct_experts(name: str) -> None:
    if name == "ours":
        model = blocks(shared_expert=8)
        inputs = [torch.randn(n, D_MODEL) for n in (1, 3, 2, 1)]
        experts: Any = model.layers[0].experts  # type: ignore[union-attr, index]
    else:
        model = make_model(Run(name, sizes=EIGHT)).eval()
        inputs = [torch.tensor([ids]) for ids in ([5], [7, 9], [5, 5], [8])]
        experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr, index]
    size = sum(p[0].numel() * p.element_size() for p in experts.parameters())
    chosen = chosen_by(model, *inputs)
    assert 1 < len(chosen[0][0]) < 8
    offloaded = offload_experts(model, "cpu", slots=1)
    with torch.inference_mode():
        model(inputs[0])  # the first layer was there as a whole
        for x, layers in zip(inputs[1:], chosen[1:], strict=True):
            before = offloaded.statistics.copied
            model(x)
            number = sum(map(len, layers))
            assert offloaded.statistics.copied - before == number * size
    assert offloaded.statistics.expert_hits == 0
    assert offloaded.statistics.misses == 0


def test_prefill_is_copied_ahead_and_steps_are_not() -> None:
    """A wrong guess costs at most the slots."""
    model = blocks()
    step, prefill = torch.randn(1, D_MODEL), torch.randn(30, D_MODEL)
    offloaded = offload_experts(model, "cpu", slots=2)
    layer, statistics = offloaded.host_bytes // 4, offloaded.statistics

    def copied(x: Tensor) -> int:
        before = statistics.copied
        model(x)
        return statistics.copied - before

    with torch.inference_mode():
        assert copied(prefill) == 4 * layer
        assert copied(step) == 2 * 2 * layer // 8  # two layers were there as a whole
        assert copied(step) == 3 * 2 * layer // 8  # one still is
        late = copied(prefill)
        assert 4 * layer <= late <= 6 * layer
        assert copied(prefill) == 4 * layer
    assert statistics.misses == 0


def ring_of(layers: int, experts: int, slots: int, cache: int = 0) -> tuple[Any, list[Tensor]]:
    """A ring over layers of one tensor (E, 3), and these; slots and rows are poisoned."""
    torch.manual_seed(0)
    host = [torch.randn(experts, 3) for _ in range(layers)]
    ring = ExpertRing(
        [Stack([t], lambda t=t: t._version, experts) for t in host], CPU, slots, cache
    )
    poisoned(ring)
    return ring, host


def one_pass(ring: Any, host: list[Tensor], layer: int, experts: list[int]) -> int:
    """Acquires experts of a layer for one token, and counts those that were copied."""
    before = ring.statistics.copied
    (found,) = ring.acquire(layer, RoutedCall(1, 1, lambda: experts))
    assert torch.equal(found[experts], host[layer][experts])
    assert not ring.holds_all(layer)
    ring.release(layer)
    copied, rest = divmod(ring.statistics.copied - before, 3 * 4)
    assert rest == 0
    return int(copied)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_whole_layers_after_single_experts(slots: int) -> None:
    """Also where slots hold some experts of the layers to come."""
    ring, host = ring_of(3, 6, slots)
    for _ in range(2):
        for layer in range(3):
            host[layer].mul_(2.0)  # so that no slot holds a whole layer
            one_pass(ring, host, layer, [layer])
    many = RoutedCall(100, 1, lambda: list(range(6)))
    for layer in (0, 1, 2, 0, 1, 2):
        (found,) = ring.acquire(layer, many)
        assert torch.equal(found, host[layer])
        assert ring.holds_all(layer)
        ring.release(layer)
        assert len({slot.layer for slot in ring._slots}) == slots
    assert ring.statistics.misses == 0


def test_a_step_that_chooses_all_experts() -> None:
    ring, host = ring_of(2, 6, 1)
    one_pass(ring, host, 1, [2])
    assert one_pass(ring, host, 0, [0, 1, 2, 3, 4, 5]) == 6
    assert one_pass(ring, host, 0, [3]) == 0
    assert one_pass(ring, host, 1, []) == 0


def test_an_expert_that_was_evicted_returns() -> None:
    ring, host = ring_of(2, 6, 1, cache=2 * 3 * 12)
    assert [layer.rows for layer in ring._cache._layers] == [3, 3]
    one_pass(ring, host, 1, [0])
    assert one_pass(ring, host, 0, [1, 2, 3]) == 3
    one_pass(ring, host, 1, [0])
    assert one_pass(ring, host, 0, [1, 3, 4]) == 1  # instead of 2
    one_pass(ring, host, 1, [0])
    assert one_pass(ring, host, 0, [2, 4]) == 1  # instead of 1
    one_pass(ring, host, 1, [0])
    assert one_pass(ring, host, 0, [1, 3]) == 1
    assert (ring.statistics.expert_hits, ring.statistics.expert_misses) == (7, 7)


def test_the_least_recently_used_go_first() -> None:
    """Against a list that is sorted by last use."""
    generator = torch.Generator().manual_seed(2)
    host = torch.randn(9, 2, generator=generator)
    cache = ExpertCache([[host]], CPU, 4 * 8)
    twin: OrderedDict[int, None] = OrderedDict()
    for step in range(200):
        number = int(torch.randint(1, 6, (), generator=generator))
        used = sorted(torch.randperm(9, generator=generator)[:number].tolist())
        slot = torch.full((9, 2), torch.nan)
        missing = cache.load(0, step // 50, used, [slot])
        if step % 50 == 0:
            twin.clear()
        assert missing == [e for e in used if e not in twin]
        for expert in used:
            if expert not in missing:
                assert torch.equal(slot[expert], host[expert])
        slot[missing] = host[missing]
        cache.keep(0, used, [slot])
        for expert in used:
            if expert in twin:
                twin.move_to_end(expert)
        for expert in used:
            if expert not in twin:
                if len(twin) == 4:
                    oldest = next((e for e in twin if e not in used), None)
                    if oldest is None:
                        break
                    del twin[oldest]
                twin[expert] = None


def test_room_is_divided_between_layers() -> None:
    layers = [[torch.zeros(4, 8), torch.zeros(4, 2)], [], [torch.zeros(2, 5)]]
    cache = ExpertCache(layers, CPU, 130)  # 40 and 20 bytes: 1 and 2 (all there are), and one more
    assert [layer.rows for layer in cache._layers] == [2, 0, 2]
    assert cache.bytes == 3 * 256
    assert [layer.rows for layer in ExpertCache(layers, CPU, 10_000)._layers] == [4, 0, 2]
    assert [layer.rows for layer in ExpertCache(layers, CPU, 79)._layers] == [1, 0, 1]
    with pytest.raises(ConfigError, match="no room for one expert, which takes 20: use .* 40"):
        ExpertCache(layers, CPU, 19)
    with pytest.raises(ConfigError, match="no layer copies single experts"):
        offload_experts(Blocks(KINDS["modules"]).eval(), "cpu", expert_cache=1000)
    with pytest.raises(ConfigError, match=r"expert_cache=1000: every layer is resident"):
        offload_experts(blocks(), "cpu", expert_cache="1KB", resident_layers=4)


@pytest.mark.parametrize("cache", [None, 20_000])
def test_weights_that_change_between_passes(cache: int | None) -> None:
    """Neither what a slot holds of a layer nor what the cache does may be used then."""
    model, other = blocks(), blocks()
    x = torch.randn(1, D_MODEL)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "experts" in name:
                parameter.add_(0.1)
        expected = other(x)
    offloaded = offload_experts(model, "cpu", slots=5, expert_cache=cache)
    with torch.inference_mode():
        for _ in range(2):
            assert not torch.equal(model(x), expected)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert offloaded.statistics.expert_misses == 4 * 2


def test_weights_that_a_pass_changes_in_place_are_not_lost_silently() -> None:
    model = blocks()
    x = torch.randn(1, D_MODEL)
    right = {name: p.detach().clone() for name, p in model.named_parameters()}
    offloaded = offload_experts(model, "cpu", slots=1)
    experts: Any = model.layers[2].experts  # type: ignore[union-attr, index]
    with torch.no_grad():
        expected = model(x)
        computing = experts._compute

        def scale(*args: Any) -> Any:
            experts.up_proj.mul_(2.0)
            return computing(*args)

        experts._compute = scale
        with pytest.raises(ConfigError, match="changed the parameters of StackedExperts in place"):
            model(x)
        del experts._compute
        assert torch.equal(model(x), expected)
    offloaded.close()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, right[name]), name


def test_a_hook_that_chooses_other_experts() -> None:
    """What comes after the hook that copies is unknown to it: all experts are there then."""
    model = make_model(Run("qwen3_moe")).eval()
    ids = torch.tensor([[5]])
    experts: Any = model.model.layers[1].mlp.experts

    def other(module: nn.Module, args: Any) -> Any:
        return (args[0], 7 - args[1], args[2])

    with torch.inference_mode():
        plain = model(ids).logits
        hook = experts.register_forward_pre_hook(other)
        expected = model(ids).logits
        hook.remove()
        assert not torch.equal(plain, expected)
        offloaded = offload_experts(model, "cpu", slots=1)
        poisoned(offloaded._ring)
        hook = experts.register_forward_pre_hook(other)
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
        hook.remove()
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_other_implementations_get_whole_layers(implementation: str) -> None:
    """What they read isn't known."""
    model = make_model(Run("qwen3_moe")).eval()
    ids = torch.tensor([[5]])
    with torch.inference_mode():
        model.set_experts_implementation(implementation)
        expected = model(ids).logits
        offloaded = offload_experts(model, "cpu", slots=1)
        poisoned(offloaded._ring)
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
    assert offloaded.statistics.expert_misses == 0


def test_dropped_slots_of_transformers() -> None:
    """Where they are computed with the weight zero, they have experts that are there."""
    model = make_model(Run("qwen3_moe")).eval()
    offloaded = offload_experts(model, "cpu", slots=1)
    experts: Any = offloaded._layers[0].experts
    x, weights = torch.zeros(2, 16), torch.ones(2, 3)
    for ids, read in (([[5, 8, 2], [8, 3, 3]], [2, 3, 5]), ([[8, 8, 8], [0, 1, 8]], [0, 1, 7])):
        call = experts.routed_call((x, torch.tensor(ids), weights))
        assert call.experts() == read
        assert (call.tokens, call.top_k) == (2, 3)


def test_runs() -> None:
    assert list(runs([])) == []
    assert list(runs([4])) == [slice(4, 5)]
    assert list(runs([0, 1, 3, 5, 6, 7])) == [slice(0, 2), slice(3, 4), slice(5, 8)]


def test_expected_experts() -> None:
    """Against counting all choices of 2 of 4 by 3 tokens."""
    pairs = [(a, b) for a in range(4) for b in range(a)]
    sets = [{*a, *b, *c} for a in pairs for b in pairs for c in pairs]
    assert expected_experts(4, 2, 3) == pytest.approx(sum(map(len, sets)) / len(sets))
    assert [are_few(128, 8, tokens) for tokens in (1, 18, 19)] == [True, True, False]
    assert not are_few(4, 4, 1)


def test_layers_of_both_kinds() -> None:
    """One of them copies whole layers whatever the number of tokens."""
    model = Blocks({}, (0, 1, 2, 3), 4).eval()
    torch.manual_seed(4)
    model.layers[1] = MoE(D_MODEL, 8, num_experts=4, **KINDS["modules"]).eval()
    batches = [torch.randn(n, D_MODEL) for n in PREFILL_AND_DECODE]
    with torch.inference_mode():
        expected = [model(batch) for batch in batches]
        offloaded = offload_experts(model, "cpu", slots=2, expert_cache=5000)
        poisoned(offloaded._ring)
        for batch, right in zip(batches, expected, strict=True):
            assert torch.equal(model(batch), right)
