"""Which experts each token goes to: the distributions under which a layer is measured.

Every routing gives each token K *distinct* experts. Experts are renamed at random at the end, so
that the busy ones lie anywhere.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from layer.errors import BenchmarkError

ROUTINGS = ("uniform", "balanced", "zipf:1.0", "zipf:1.5", "one", "half")
"""The routings of a full run. Any exponent may follow ``zipf:``."""


def parse_routings(text: str) -> list[str]:
    """``"all"`` or comma-separated names.

    Raises:
        BenchmarkError: for an unknown name.
    """
    if text == "all":
        return list(ROUTINGS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ROUTINGS and _exponent(name) is None:
            raise BenchmarkError(
                f"--routings {text!r}: {name!r} is not a routing. Take 'all' or some of:"
                f" {', '.join(ROUTINGS)}."
            )
    if not names:
        raise BenchmarkError("--routings names no routing.")
    return names


def _exponent(name: str) -> float | None:
    found = re.fullmatch(r"zipf:(\d+(?:\.\d+)?)", name)
    return float(found[1]) if found else None


def draw_expert_ids(
    name: str, tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> Tensor:
    """The K experts of each token.

    * uniform: any K of E, each set as likely as any other.
    * balanced: the counts of two experts differ by one pair at most.
    * zipf:s: K draws without replacement, the r-th expert's chance in proportion to ``r**-s``
      (Gumbel top-k). With K > 1 no expert can have more than one pair of each token.
    * one: all tokens to the same K experts; all the others are empty.
    * half: uniform over the first E/2 experts; the other half is empty.

    Args:
        name: one of the above.
        tokens: T.
        num_experts: E.
        top_k: K.
        generator: the source of all randomness; its device is that of the result.

    Returns:
        (T, K) int64.

    Raises:
        BenchmarkError: if half of the experts are fewer than K.
    """
    device = generator.device

    def uniform(experts: int) -> Tensor:
        keys = torch.rand(tokens, experts, generator=generator, device=device)
        return keys.topk(top_k, dim=1).indices

    exponent = _exponent(name)
    if name == "uniform":
        ids = uniform(num_experts)
    elif name == "balanced":
        order = torch.randperm(tokens, generator=generator, device=device)
        ids = order.unsqueeze(1) * top_k + torch.arange(top_k, device=device)
        ids = ids % num_experts
    elif exponent is not None:
        ranks = torch.arange(1, num_experts + 1, device=device, dtype=torch.float64)
        noise = torch.rand(tokens, num_experts, generator=generator, device=device)
        gumbel = -torch.log(-torch.log(noise.double().clamp(1e-12, 1 - 1e-12)))
        ids = (gumbel - exponent * ranks.log()).topk(top_k, dim=1).indices
    elif name == "one":
        ids = torch.arange(top_k, device=device).expand(tokens, top_k)
    elif name == "half":
        if num_experts // 2 < top_k:
            raise BenchmarkError(
                f"routing 'half' leaves {num_experts // 2} experts for top_k={top_k}"
            )
        ids = uniform(num_experts // 2)
    else:
        raise BenchmarkError(f"{name!r} is not a routing; take some of: {', '.join(ROUTINGS)}")
    renamed = torch.randperm(num_experts, generator=generator, device=device)
    return renamed[ids].contiguous()
