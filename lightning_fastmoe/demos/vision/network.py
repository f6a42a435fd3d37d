"""A hierarchical vision transformer whose every second feed-forward block is a MoE layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_fastmoe.demos.vision.attention import WindowAttention
from lightning_fastmoe.demos.vision.block import FeedForward, SwinBlock
from lightning_fastmoe.demos.vision.patches import PatchEmbedding, PatchMerging
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.transformer import Linear

MOE: Mapping[str, Any] = {
    "router": "cosine",
    # Experts keep the tokens with the best scores: batch-prioritised routing. Evaluation drops
    # none, so that an image's class does not depend on the other images of its batch.
    "capacity_factor": (1.25, None),
    "drop_by": "score",
    "activation": "gelu",
    "bias": True,
}
"""Arguments of the MoE layers, unless others are given."""


class SwinMoE(nn.Module):
    """Swin V2 (Liu et al. 2022) with experts, the application of Tutel (Hwang et al. 2023).

    Stages of blocks, each stage at half the side and twice the width of the one before. In every
    second block the windows are shifted, where the grid has several, and the feed-forward block is
    a mixture of experts.

    The norm after a MoE layer cancels any factor of its output. With a single expert per token the
    router's weight is such a factor, and the router would not learn from the loss; hence top 2.

    Args:
        image_size: pixels along an image's side.
        channels: colours of a pixel, C.
        num_classes: classes to tell apart.
        patch_size: pixels along the side of a patch, which becomes a token.
        d_model: width of the first stage's tokens.
        depths: blocks of each stage.
        head_dim: width of an attention head.
        window_size: tokens along a window's side; a smaller grid is one window.
        ffn_ratio: inner width of an expert or a dense feed-forward block, in widths of the stage.
        num_experts: experts of each MoE layer, over all ranks.
        top_k: experts per token.
        moe: further arguments of each MoE layer, which go before those of :data:`MOE`.
        bias_hidden: inner width of the network of relative positions.
        init_std: standard deviation of the initial weights of all but the MoE layers.

    Raises:
        ConfigError: if sizes don't divide each other, ``moe`` has an argument that the layer
            doesn't, or a router couldn't learn.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        patch_size: int,
        d_model: int,
        depths: Sequence[int],
        head_dim: int,
        window_size: int,
        ffn_ratio: int,
        num_experts: int,
        top_k: int | None,
        moe: Mapping[str, Any] | None,
        bias_hidden: int,
        init_std: float,
    ) -> None:
        super().__init__()
        check_sizes(image_size, patch_size, d_model, depths, head_dim, window_size)
        arguments = moe_arguments(moe)
        self.embedding = PatchEmbedding(channels, d_model, patch_size)
        stages: list[nn.Module] = []
        for stage, (grid, size, depth) in enumerate(
            stage_sizes(image_size, patch_size, depths, window_size)
        ):
            width = d_model * 2**stage
            if stage:
                stages.append(PatchMerging(width // 2, init_std))
            for block in range(depth):
                odd = block % 2 == 1
                attention = WindowAttention(width, width // head_dim, size, bias_hidden, init_std)
                ffn: nn.Module
                if odd:
                    ffn = MoE(width, ffn_ratio * width, num_experts, top_k, **arguments)
                    check_router_learns(ffn)
                else:
                    ffn = FeedForward(width, ffn_ratio * width, init_std)
                shift = size // 2 if odd and size < grid else 0
                stages.append(SwinBlock(grid, attention, ffn, width, size, shift))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(width)
        self.head = Linear(width, num_classes, init_std, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes.

        Args:
            images: (B, C, image_size, image_size), floating.

        Returns:
            Logits, (B, num_classes).
        """
        x = self.stages(self.embedding(images))
        logits: Tensor = self.head(self.norm(x).mean(dim=(1, 2)))
        return logits


def stage_sizes(
    image_size: int, patch_size: int, depths: Sequence[int], window_size: int
) -> Iterator[tuple[int, int, int]]:
    """(tokens along the grid's side, along a window's side, blocks) of each stage."""
    grid = image_size // patch_size
    for depth in depths:
        yield grid, min(grid, window_size), depth
        grid //= 2


def check_sizes(
    image_size: int,
    patch_size: int,
    d_model: int,
    depths: Sequence[int],
    head_dim: int,
    window_size: int,
) -> None:
    """Refuses sizes that don't divide each other.

    Raises:
        ConfigError: naming the two, and what to change.
    """
    sizes = {"patch_size": patch_size, "head_dim": head_dim, "window_size": window_size}
    for name, value in {**sizes, "image_size": image_size, "d_model": d_model}.items():
        if value < 1:
            raise ConfigError(f"model.{name} is {value}; it must be 1 or more.")
    if not depths or min(depths) < 1:
        raise ConfigError(f"model.depths is {depths!r}; it must give each stage 1 block or more.")
    if image_size % patch_size:
        raise ConfigError(
            f"model.image_size is {image_size} and model.patch_size is {patch_size}; patches must"
            " cover the image. Change either."
        )
    if d_model % head_dim:
        raise ConfigError(
            f"model.d_model is {d_model} and model.head_dim is {head_dim}; heads must divide the"
            " width. Change either."
        )
    stages = list(stage_sizes(image_size, patch_size, depths, window_size))
    for stage, (grid, size, _) in enumerate(stages):
        if stage + 1 < len(stages) and (grid < 2 or grid % 2):
            raise ConfigError(
                f"Stage {stage} has a grid of {grid} x {grid} tokens, which can't be halved for the"
                " next one. Give model.depths fewer stages, or change model.image_size or"
                " model.patch_size."
            )
        if grid % size:
            raise ConfigError(
                f"Stage {stage} has a grid of {grid} x {grid} tokens, and model.window_size is"
                f" {window_size}; windows must cover the grid. Change model.window_size,"
                " model.image_size or model.patch_size."
            )


def moe_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of the MoE layers: those given, and :data:`MOE` for the others.

    Raises:
        ConfigError: if one is unknown, or set by the model.
    """
    given = given or {}
    own = {"self", "d_model", "d_ffn", "num_experts", "top_k"}
    known = inspect.signature(MoE.__init__).parameters.keys() - own
    if unknown := sorted(given.keys() - known):
        raise ConfigError(
            f"model.moe has {', '.join(unknown)}; it may have: {', '.join(sorted(known))}."
        )
    return {**MOE, **given}


def check_router_learns(layer: MoE) -> None:
    """Refuses a layer whose router the norm after it would keep from learning.

    Raises:
        ConfigError: if a token's output is that of one expert times the router's weight.
    """
    trained = any(p.requires_grad for p in layer.router.parameters())
    if trained and layer.top_k == 1 and layer.shared_expert is None:
        raise ConfigError(
            "model.top_k is 1, and the norm after each MoE layer would cancel the weight of a"
            " single expert: routers would not learn from the loss. Use top_k=2, or add"
            " moe={'shared_expert': width}."
        )
