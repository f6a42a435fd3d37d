"""The network: which blocks shift and hold experts, norms, patches, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fastmoe.demos.optimization import decay_groups
from lightning_fastmoe.demos.vision import ImageClassifier, SwinMoE
from lightning_fastmoe.demos.vision.block import SwinBlock
from lightning_fastmoe.demos.vision.patches import PatchEmbedding, PatchMerging
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, Routing, moe_layers
from lightning_fastmoe.nn.router.cosine import CosineTopKRouter


def make(**changes: Any) -> SwinMoE:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "image_size": 16,
        "channels": 3,
        "num_classes": 5,
        "patch_size": 2,
        "d_model": 8,
        "depths": (2, 4),
        "head_dim": 4,
        "window_size": 4,
        "ffn_ratio": 2,
        "num_experts": 4,
        "top_k": 2,
        "moe": None,
        "bias_hidden": 6,
        "init_std": 0.2,
    }
    return SwinMoE(**{**arguments, **changes})


def blocks(network: nn.Module) -> list[SwinBlock]:
    return [module for module in network.modules() if isinstance(module, SwinBlock)]


def test_every_second_block_shifts_its_windows_and_has_experts() -> None:
    """The second stage has a grid of 4 x 4, which is one window: nothing to shift."""
    found = [(b.size, b.shift, isinstance(b.ffn, MoE)) for b in blocks(make())]
    assert found == [(4, 0, False), (4, 2, True)] + 2 * [(4, 0, False), (4, 0, True)]
    layer = next(module for _, module in moe_layers(make()))
    assert isinstance(layer.router, CosineTopKRouter)
    assert (layer.capacity_factor, layer.eval_capacity_factor) == (1.25, None)
    assert (layer.drop_by, layer.top_k) == ("score", 2)


def test_blocks_normalise_what_they_add() -> None:
    block = blocks(make())[0]
    x = torch.randn(2, 8, 8, 8)
    seen: list[Tensor] = []
    block.ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    y = block(x)
    for added in (seen[0] - x, y - seen[0]):
        torch.testing.assert_close(added.mean(dim=-1), torch.zeros(2, 8, 8), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            added.var(dim=-1, unbiased=False), torch.ones(2, 8, 8), rtol=0.02, atol=0
        )


def reach(block: SwinBlock, row: int, column: int) -> set[tuple[int, int]]:
    """Which tokens change, if only in the last bit, when the one at (row, column) does."""
    block, x = block.double(), torch.randn(1, 8, 8, 8, dtype=torch.float64)
    other = x.clone()
    other[0, row, column] += 1
    changed = (block._attend(x) != block._attend(other)).any(dim=-1)[0]
    return {(int(i), int(j)) for i, j in changed.nonzero()}


@pytest.mark.parametrize(
    ("row", "column", "rows", "columns"),
    [
        (0, 0, range(0, 2), range(0, 2)),
        (3, 5, range(2, 6), range(2, 6)),
        (7, 4, range(6, 8), range(2, 6)),
        (1, 7, range(0, 2), range(6, 8)),
    ],
)
def test_shifted_windows_end_at_the_image(
    row: int, column: int, rows: range, columns: range
) -> None:
    plain, shifted = blocks(make())[:2]
    assert reach(shifted, row, column) == {(i, j) for i in rows for j in columns}
    top, left = row // 4 * 4, column // 4 * 4
    square = {(i, j) for i in range(top, top + 4) for j in range(left, left + 4)}
    assert reach(plain, row, column) == square


def test_patches_are_tokens() -> None:
    embedding = PatchEmbedding(3, 8, 2)
    images = torch.randn(2, 3, 6, 6)
    weight, bias = embedding.projection.weight, embedding.projection.bias
    actual = embedding(images)
    for row in range(3):
        for column in range(3):
            patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = embedding.norm(patch.flatten(1) @ weight.flatten(1).T + bias)
            torch.testing.assert_close(actual[:, row, column], expected)


def test_merging_takes_two_by_two_tokens() -> None:
    merging = PatchMerging(3, init_std=0.3)
    x = torch.randn(2, 4, 6, 3)
    actual = merging(x)
    assert actual.shape == (2, 2, 3, 6)
    for row in range(2):
        for column in range(3):
            a, b = x[:, 2 * row, 2 * column], x[:, 2 * row + 1, 2 * column]
            c, d = x[:, 2 * row, 2 * column + 1], x[:, 2 * row + 1, 2 * column + 1]
            expected = merging.norm(torch.cat([a, b, c, d], dim=1) @ merging.projection.weight.T)
            torch.testing.assert_close(actual[:, row, column], expected)


def test_full_experts_keep_the_tokens_with_the_best_scores() -> None:
    network = make(moe={"capacity_factor": (0.5, None)})
    seen: list[Routing] = []
    layer = blocks(network)[1].ffn
    assert isinstance(layer, MoE)
    layer.register_routing_observer(lambda _, routing: seen.append(routing))
    images = torch.randn(3, 3, 16, 16)
    network(images)
    routing = seen[0]
    capacity = 0.5 * 2 * len(routing.scores) / 4
    assert routing.kept is not None
    for expert in range(4):
        first = routing.expert_ids[:, 0] == expert
        best = routing.scores.max(dim=1).values
        kept = first & routing.kept[:, 0]
        assert int(kept.sum()) == min(int(first.sum()), capacity)
        lost = first & ~routing.kept[:, 0]
        if lost.any():
            assert best[kept].min() >= best[lost].max()
    assert int(routing.dropped_counts().sum()) > 0
    network.eval()(images)
    assert int(seen[-1].dropped_counts().sum()) == 0


def test_an_images_class_does_not_depend_on_others_in_evaluation() -> None:
    network = make().eval()
    images = torch.randn(3, 3, 16, 16)
    alone = torch.cat([network(image) for image in images.split(1)])
    torch.testing.assert_close(network(images), alone)


def test_bf16_is_close_to_fp32() -> None:
    """Autocast, and weights in bf16. Each token has both experts, as a near tie may flip."""
    network = make(d_model=64, head_dim=16, num_experts=2).eval()
    images = torch.randn(6, 3, 16, 16)
    expected = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(images)
    assert mixed.dtype == torch.bfloat16
    narrow = network.bfloat16()(images.bfloat16())
    for actual in (mixed, narrow):
        error = (actual.float() - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.05


def router_gradient(top_k: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the loss alone, relative to that of the experts."""
    from lightning_fastmoe.demos.vision import network as module

    monkeypatch.setattr(module, "check_router_learns", lambda layer: None)
    moe = {"load_balancing": 0.0, "z_loss": 0.0, "capacity_factor": None}
    network = make(top_k=top_k, moe=moe).double()
    network(torch.randn(4, 3, 16, 16, dtype=torch.float64)).logsumexp(dim=1).sum().backward()
    layer = next(found for _, found in moe_layers(network))
    router, expert = (
        sum(float(p.grad.square().sum()) for p in part.parameters() if p.grad is not None) ** 0.5
        for part in (layer.router, layer.experts)
    )
    return router / expert


def test_a_single_experts_weight_is_cancelled_by_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why one expert per token is refused."""
    assert router_gradient(1, monkeypatch) < 0.02 * router_gradient(2, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_size": 15}, "image_size is 15 and model.patch_size is 2"),
        ({"d_model": 10}, "d_model is 10 and model.head_dim is 4"),
        ({"image_size": 12}, "grid of 6 x 6 tokens, and model.window_size is 4"),
        ({"depths": (2, 2, 2, 2, 2)}, "Stage 3 has a grid of 1 x 1 tokens, which can't be halved"),
        ({"depths": ()}, "depths is (); it must give each stage 1 block or more"),
        ({"depths": (2, 0)}, "depths is (2, 0)"),
        ({"window_size": 0}, "window_size is 0; it must be 1 or more"),
        ({"moe": {"rooter": "cosine", "top_k": 1}}, "model.moe has rooter, top_k; it may have: "),
        ({"top_k": 1}, "model.top_k is 1, and the norm after each MoE layer would cancel"),
        ({"top_k": None, "moe": {"router": "switch"}}, "model.top_k is 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**changes)
    assert expected in str(caught.value)


def test_sizes_are_checked_before_other_processes_start() -> None:
    with pytest.raises(ConfigError, match=r"image_size is 8 and model.patch_size is 3"):
        ImageClassifier(8, 1, 10, patch_size=3)


def test_one_expert_is_fine_where_its_weight_matters() -> None:
    make(top_k=1, moe={"shared_expert": 8})
    make(top_k=1, moe={"router": "hash"})


def test_matrices_decay_and_temperatures_do_not() -> None:
    network = make()
    decay, no_decay = decay_groups(network, 0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    kept = {names[id(p)] for p in no_decay["params"]}
    assert kept | {names[id(p)] for p in decay["params"]} == set(names.values())
    ends = ("bias", "log_scale")
    assert kept == {n for n in names.values() if n.endswith(ends) or "norm" in n}
    assert any("router" in name for name in kept)


def test_a_model_without_a_network_says_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"call configure_model\(\) first"):
        ImageClassifier(8, 1, 10)(torch.zeros(1, 1, 8, 8))
