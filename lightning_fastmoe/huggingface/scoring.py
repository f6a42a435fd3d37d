"""The loss of a language model of transformers, whose logits never exist as a whole.

Those of 131,072 positions and 151,936 tokens would take 80 GB in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.batch import IGNORED
from lightning_fastmoe.huggingface.head import summed_cross_entropy

ROWS = 4096
"""Positions whose logits exist at a time."""


@torch.no_grad()
def causal_lm_loss(model: Any, labels: Tensor, *, rows: int = ROWS, **inputs: Any) -> Tensor:
    """``model(**inputs, labels=labels).loss``, with the logits of a few positions at a time.

    Args:
        model: a causal language model of transformers.
        labels: (B, S) int64, -100 for positions that don't count; not shifted.
        rows: positions whose logits exist at a time.
        inputs: of the model: ``input_ids (B, S)``, ``attention_mask (B, S)`` and the like.

    Returns:
        The mean cross-entropy of the next token in nats, a scalar in fp32, without gradient; NaN if
        no position counts. As the model's own up to rounding, but always without the router's
        auxiliary losses.

    Raises:
        ConfigError: if the model has no backbone, or its head isn't computed position by position.
    """
    hidden = _backbone(model)(**inputs, use_cache=False)[0]
    return chunked_loss(model, hidden, labels, rows)


@torch.no_grad()
def chunked_loss(model: Any, hidden: Tensor, labels: Tensor, rows: int = ROWS) -> Tensor:
    """:func:`causal_lm_loss` from hidden states ``hidden (B, S, D)``, the backbone's output.

    The model itself computes logits from them, so that what it does to them (scaling, soft caps) is
    done here, too.
    """
    backbone = _backbone(model)
    wanted = torch.full_like(labels, IGNORED)
    wanted[:, :-1] = labels[:, 1:]
    parts = zip(hidden.flatten(0, 1).split(rows), wanted.flatten().split(rows), strict=True)
    total = torch.zeros((), device=hidden.device)
    given = _Given()
    replaced = vars(backbone).get("forward")
    vars(backbone)["forward"] = given
    try:
        for given.hidden, targets in parts:
            logits = model(input_ids=targets[None], use_cache=False, output_router_logits=False)[0]
            if logits.shape[:-1] != (1, len(targets)):
                raise ConfigError(
                    f"{type(model).__name__} returns logits {tuple(logits.shape)} of"
                    f" {len(targets)} positions: compute the loss from model(...).logits."
                )
            total = total + summed_cross_entropy(logits[0], targets)
    finally:
        if replaced is None:
            del vars(backbone)["forward"]
        else:
            vars(backbone)["forward"] = replaced
    return total / (wanted != IGNORED).sum()


class _Given:
    """Replaces a backbone's forward method.

    Attributes:
        hidden: (N, D), what it returns.
    """

    hidden: Tensor

    def __call__(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        hidden: Any = self.hidden[None]
        return MoeModelOutputWithPast(last_hidden_state=hidden)


def _backbone(model: Any) -> Any:
    backbone = getattr(model, "base_model", model)
    if backbone is model:
        raise ConfigError(
            f"{type(model).__name__} isn't a language model of transformers with a backbone and a"
            " head: load it with AutoModelForCausalLM."
        )
    return backbone
