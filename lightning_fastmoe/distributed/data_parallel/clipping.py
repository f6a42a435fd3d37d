"""The norm of gradients of which each expert's is on some ranks only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def global_norm(
    dense: Iterable[Tensor],
    experts: Iterable[Tensor],
    group: dist.ProcessGroup | None,
    norm_type: float,
    device: torch.device,
) -> Tensor:
    """The norm over the whole model, in which each expert counts once; collective.

    Args:
        dense: gradients that all ranks have.
        experts: gradients of this rank's experts.
        group: the expert parallel group, whose ranks together have each expert once; None if this
            rank has all.
        norm_type: p, positive; infinity is the largest absolute value.
        device: the device of the gradients.

    Returns:
        A scalar, identical on every rank: fp64 if a gradient is, else fp32.
    """
    dense, experts = list(dense), list(experts)
    own = torch.stack([_power_sum(some, norm_type, device) for some in (dense, experts)])
    parts = [own]
    if group is not None:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
    # Added in the order of ranks, so that every group gets the same bits.
    terms = torch.stack([parts[0][0], *(part[1] for part in parts)])
    largest = norm_type == torch.inf
    total = terms.max() if largest else terms.sum() ** (1.0 / norm_type)
    return total.to(_norm_dtype([*dense, *experts]))


def _norm_dtype(gradients: list[Tensor]) -> torch.dtype:
    """fp64 if a gradient is, else fp32."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(g.dtype in wide for g in gradients) else torch.float32


def _power_sum(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Sum of ``|g| ** norm_type`` over all elements, or the largest ``|g|``; fp64."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    dtype = _norm_dtype(gradients)
    sizes = (g.abs() if g.is_complex() else g for g in gradients)
    norms = torch.stack(
        [torch.linalg.vector_norm(size, norm_type, dtype=dtype).double() for size in sizes]
    )
    return norms.max() if norm_type == torch.inf else norms.pow(norm_type).sum()
