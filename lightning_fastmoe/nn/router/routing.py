"""A router's output (``Routing``) and its input besides the tokens (``RoutingContext``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.global_batch import GlobalBatch, LocalBatch
from lightning_fastmoe.nn.router.random import uniform


class Routing(NamedTuple):
    """The choice of experts for T tokens, in one of three forms.

    - Token choice: ``expert_ids`` and ``weights`` are (T, K); each token has K slots.
    - Expert choice: they are (N,), and ``token_ids (N,)`` says which token each pair belongs to; a
      token occurs any number of times. N must not depend on the data.
    - Soft: ``dispatch_mix (G, S, n)`` turns each of G sequences of n tokens into S rows, which are
      routed as in token choice (``expert_ids (G*S, 1)``), and ``combine_mix (G, n, S)`` turns the
      results into tokens again: T = G*n.

    A named tuple because ZeRO 3 looks for tensors in a module's output, to know when the module's
    backward pass begins, and it looks into tuples but not into dataclasses.

    Attributes:
        logits: (T, E) fp32, raw.
        scores: (T, E) fp32, non-negative, rows sum to 1: the router's probabilities, as losses and
            metrics use them.
        weights: fp32, used to combine; differentiable with respect to the router.
        expert_ids: int64, global expert ids.
        active: (T, K) bool, the slots that the router uses; None for all.
        kept: (T, K) bool, the active slots that fit into their expert's capacity; None for all
            active ones. The others contribute zero.
        token_ids: (N,) int64, for expert choice.
        dispatch_mix: (G, S, n), for soft routing.
        combine_mix: (G, n, S), for soft routing.
        load: (T, E), the probability that a token chooses an expert if that expert's noise is
            redrawn; for the load loss of noisy routers.
        tokens_per_expert: (E,) int64, counts of the active pairs, if they are known already.
        balanced_slots: how many slots, from the first, the load-balancing losses count; None for
            all.
    """

    logits: Tensor
    scores: Tensor
    weights: Tensor
    expert_ids: Tensor
    active: Tensor | None = None
    kept: Tensor | None = None
    token_ids: Tensor | None = None
    dispatch_mix: Tensor | None = None
    combine_mix: Tensor | None = None
    load: Tensor | None = None
    tokens_per_expert: Tensor | None = None
    balanced_slots: int | None = None

    @property
    def dispatched(self) -> Tensor | None:
        """(T, K) bool: the slots that reach an expert; None for all."""
        return self.active if self.kept is None else self.kept

    def routed_counts(self) -> Tensor:
        """(E,) int64: the pairs that the router chose, before any capacity. No host sync."""
        if self.tokens_per_expert is not None:
            return self.tokens_per_expert
        return count_experts(self.expert_ids, self.logits.shape[1], self.active)

    def balanced_counts(self) -> Tensor:
        """(E,) int64: the routed pairs that the load-balancing losses count."""
        if self.balanced_slots is None:
            return self.routed_counts()
        first = slice(self.balanced_slots)
        active = None if self.active is None else self.active[:, first]
        return count_experts(self.expert_ids[:, first], self.logits.shape[1], active)

    def kept_counts(self) -> Tensor:
        """(E,) int64: the pairs that reach their expert."""
        if self.kept is None:
            return self.routed_counts()
        return count_experts(self.expert_ids, self.logits.shape[1], self.kept)

    def dropped_counts(self) -> Tensor:
        """(E,) int64: the pairs that exceeded their expert's capacity: routed = kept + dropped."""
        return self.routed_counts() - self.kept_counts()


def count_experts(expert_ids: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Counts of each expert among ``expert_ids`` where ``mask`` holds, (E,) int64."""
    ids = expert_ids if mask is None else expert_ids.masked_fill(~mask, num_experts)
    flat = ids.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


@dataclass
class RoutingContext:
    """A router's input besides the tokens; filled in by the layer.

    Attributes:
        training: whether the layer is training.
        grid: (G, n): before masking the tokens are G sequences of n each, concatenated.
        positions: (T,) int64, the positions of the unmasked tokens in the grid; None without a
            mask.
        sequence_ids: (T,) int64, numbers of the sequences that the tokens belong to, ascending
            and below G * n; None if each row of the grid is one sequence.
        token_ids: (T,) integers, the vocabulary ids that the layer was called with, or None.
        capacity_factor: the layer's, for training or evaluation; None is dropless.
        seed: the layer's random seed.
        first_token: int64 scalar tensor, the number of the first token of this pass, counted from
            the start of training over all ranks and micro-batches; None where nothing is drawn.
        batch: access to the other ranks' tokens.
        layer: the layer's name, for errors.
    """

    training: bool = False
    grid: tuple[int, int] | None = None
    positions: Tensor | None = None
    sequence_ids: Tensor | None = None
    token_ids: Tensor | None = None
    capacity_factor: float | None = None
    seed: int = 0
    first_token: Tensor | None = None
    batch: GlobalBatch = field(default_factory=LocalBatch)
    layer: str = "MoE"

    def uniform(self, like: Tensor, columns: int, stream: int = 0) -> Tensor:
        """Uniform random numbers (T, columns) in [0, 1), in the dtype of ``like (T, ...)``.

        Token i of the global batch gets the same numbers on any number of ranks, with any number of
        micro-batches, on the CPU and on CUDA. Masked tokens are not counted, so padding changes
        nothing.

        Args:
            like: T tokens.
            columns: numbers per token.
            stream: use a different one for each call in the same pass.
        """
        at = torch.arange(like.shape[0], dtype=torch.int64, device=like.device)
        if self.first_token is not None:
            at = at + self.first_token
        return uniform(self.seed, stream, at, columns).to(like.dtype)

    def sequences(self, num_tokens: int) -> tuple[int, int]:
        """:attr:`grid`, for routers that work on whole sequences.

        Raises:
            ConfigError: if the input is masked, or its rows hold several sequences.
        """
        if self.sequence_ids is not None:
            raise ConfigError(
                f"{self.layer}: this router works on whole rows of the batch, but sequence_ids="
                " says that rows hold several sequences, which it would mix. Give each sequence a"
                " row of its own, or choose a router that treats each token alone."
            )
        if self.positions is not None:
            raise ConfigError(
                f"{self.layer}: this router works on whole sequences, so mask= can't take tokens"
                " out of them. Drop the mask, or choose a router that treats each token alone."
            )
        return self.grid or (1, num_tokens)
