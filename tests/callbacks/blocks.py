"""A model of many blocks for tests of SparseUpdate."""

from __future__ import annotations

from typing import Any

import torch
from callbacks.model import D_FFN, D_MODEL, Model
from torch import Tensor, nn

from lightning_fastmoe import MoE


class Block(nn.Module):
    """A dense layer and a MoE layer, both residual."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(D_MODEL, D_MODEL)
        self.moe = MoE(D_MODEL, D_FFN, 4, **{"top_k": 2, "activation": "relu", **options})

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.dense(x))
        out: Tensor = x + self.moe(x)
        return out


class Blocks(Model):
    """An embedding, eleven blocks and a readout: names sort otherwise than the blocks run."""

    def __init__(self, count: int = 11, tied: bool = False, **options: Any) -> None:
        super().__init__(steps=3)
        del self.first, self.second, self.readout
        self.blocks = nn.ModuleList([Block(**options) for _ in range(count)])
        self.readout = nn.Linear(D_MODEL, 11, bias=False)
        if tied:
            self.readout.weight = self.embedding.weight
        self.gradients: dict[str, Tensor] = {}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.readout(x)
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self.gradients:
            named = self.named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}


class Late(Blocks):
    """Builds its blocks in configure_model, and applies a callback there if it has one.

    Attributes:
        callback: a ``SparseUpdate``, or None.
    """

    callback: Any = None

    def configure_model(self) -> None:
        if len(self.blocks) == 0:
            self.blocks.extend(Block() for _ in range(2))
            if self.callback is not None:
                self.callback.apply(self)
