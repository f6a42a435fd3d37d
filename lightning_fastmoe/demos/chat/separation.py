"""Finds out whether a model keeps texts apart that share a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError

_TOKENS = 4  # of each of two texts


def check_separation(model: Any) -> None:
    """Refuses a model whose attention goes across texts that only ``position_ids`` keep apart.

    Most models of transformers build their masks so that it doesn't; gpt-oss, for one, does not
    look (5.17). The second text's logits must not depend on the first text at all: their gradient
    with respect to its embeddings is exactly zero.

    Args:
        model: a causal language model of transformers, with all its weights on this process.

    Raises:
        ConfigError: if the second of two texts sees the first one.
    """
    embeddings: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    device = next(model.parameters()).device
    places = torch.arange(_TOKENS, device=device)
    handle = model.get_input_embeddings().register_forward_hook(keep)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(
                input_ids=torch.arange(2 * _TOKENS, device=device)[None],
                position_ids=torch.cat([places, places])[None],
                use_cache=False,
            ).logits
            score = logits[0, _TOKENS:].float().square().sum()
            (gradient,) = torch.autograd.grad(score, embeddings[-1])
    finally:
        handle.remove()
        model.train(was_training)
    first, second = gradient[0].abs().amax(dim=1).split(_TOKENS)
    if not bool(second.all()) or bool(first.any()):
        raise ConfigError(
            f"{type(model).__name__} doesn't keep texts apart that share a row: each would see"
            " those before it. Don't pack them: ChatFiles(..., packed=False)."
        )
