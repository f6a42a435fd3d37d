"""The output layer of a language model, and a loss that never holds all of its logits.

With 151,936 tokens in the vocabulary, the fp32 logits of 16,384 positions take 10 GB, and their
gradient as much again. Computed in chunks of positions, with their gradients, no more than one
chunk exists at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_fastmoe.huggingface.batch import IGNORED
from lightning_fastmoe.huggingface.chunked_loss import chunked_cross_entropy
from lightning_fastmoe.nn.transformer import Linear

LIMIT = 2**30
"""Bytes of fp32 logits above which the loss is computed in chunks, and that a chunk may have."""

_FP32 = 4


class Head(Linear):
    """A linear layer from hidden states to logits, which can also compute their loss.

    Gradients are computed in the forward pass. In fp16, where they must be scaled before they are
    rounded, and inside graphs of ``torch.compile``, chunks are computed again in the backward pass.

    The chunks are inside of one call, rather than calls of their own: ZeRO 3 gathers the weight for
    each call, and ranks with different numbers of chunks would wait for each other forever.
    """

    compiles_loss = False
    """Whether ``torch.compile`` makes one kernel of what follows a chunk's logits, on CUDA."""

    def computes_loss_of(self, x: Tensor) -> bool:
        """Whether the loss of ``x (..., d_model)`` should not be computed from all of its logits.

        In fp32 they may exceed :data:`LIMIT`, or a compiled kernel is faster.
        """
        if x.shape[:-1].numel() * self.out_features * _FP32 > LIMIT:
            return True
        return self.compiles_loss and x.is_cuda and not self._is_recomputed(x)

    @override
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predicts the next token.

        Args:
            x: hidden states, (..., d_model).
            targets: (N,) int64 for ``x (N, d_model)``, -100 for positions that don't count; None
                returns logits.

        Returns:
            Logits, (..., vocab_size), or the sum of the cross-entropies in nats: a scalar in fp32,
            or in fp64 if ``x`` is. As :func:`summed_cross_entropy` of the logits up to rounding:
            gradients of the weight are rounded to its dtype once per chunk.
        """
        if targets is None:
            return super().forward(x)
        rows = max(1, LIMIT // (self.out_features * _FP32))
        if self._is_recomputed(x):
            return self._recomputed(x, targets, rows)
        return chunked_cross_entropy(x, self.weight, self.bias, targets, rows, self.compiles_loss)

    def _is_recomputed(self, x: Tensor) -> bool:
        kind = x.device.type
        autocast = {torch.get_autocast_dtype(kind)} if torch.is_autocast_enabled(kind) else set()
        dtypes = {x.dtype, self.weight.dtype} | autocast
        return torch.float16 in dtypes or torch.compiler.is_compiling()

    def _recomputed(self, x: Tensor, targets: Tensor, rows: int) -> Tensor:
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for hidden, wanted in zip(x.split(rows), targets.split(rows), strict=True):
            # Nothing here is random, and reading the random state would wait for the device.
            total = total + checkpoint(
                self._sum, hidden, wanted, use_reentrant=False, preserve_rng_state=False
            )
        return total

    def _sum(self, x: Tensor, targets: Tensor) -> Tensor:
        return summed_cross_entropy(F.linear(x, self.weight, self.bias), targets)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies in nats, computed in fp32, or in fp64 if the logits are.

    Args:
        logits: (N, vocab_size).
        targets: (N,) int64, -100 for positions that don't count.

    Returns:
        A scalar; 0 if no position counts.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
