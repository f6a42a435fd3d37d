"""Averages gradients over ranks, in flat buckets.

As in PyTorch's DDP (Li et al. 2020), many small gradients make one collective. Here it runs after
the backward pass, when the user says so, and while one bucket is on its way the next is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def average_gradients(
    gradients: Iterable[Tensor],
    group: dist.ProcessGroup | None,
    divisor: int,
    bucket_bytes: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Sums gradients over a group and divides them, in place; the ranks' lists must match.

    Args:
        gradients: of any shapes and dtypes, on one device.
        group: the ranks; None is the world.
        divisor: of the sums.
        bucket_bytes: up to this size, gradients of one dtype are sent together.
        dtype: the dtype of the sums; None is each gradient's own, as is that of complex ones.
    """
    finish: Callable[[], None] | None = None
    for bucket in _buckets(gradients, bucket_bytes):
        finish_next = _start(bucket, group, divisor, dtype)
        if finish is not None:
            finish()
        finish = finish_next
    if finish is not None:
        finish()


def _buckets(gradients: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Gradients of one dtype, up to ``limit`` bytes together; larger ones are on their own."""
    filling: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}
    for gradient in gradients:
        dtype, size = gradient.dtype, gradient.numel() * gradient.element_size()
        if size >= limit:
            yield [gradient]
            continue
        if sizes.get(dtype, 0) + size > limit:
            yield filling.pop(dtype)
            sizes[dtype] = 0
        filling.setdefault(dtype, []).append(gradient)
        sizes[dtype] = sizes.get(dtype, 0) + size
    yield from filling.values()


def _start(
    bucket: list[Tensor], group: dist.ProcessGroup | None, divisor: int, dtype: torch.dtype | None
) -> Callable[[], None]:
    """Starts to reduce a bucket; the function that is returned waits for it."""
    first = bucket[0]
    if dtype is None or first.is_complex():  # a real dtype would drop the imaginary parts
        dtype = first.dtype
    in_place = len(bucket) == 1 and first.is_contiguous() and dtype == first.dtype
    flat = first.view(-1) if in_place else torch.cat([g.reshape(-1).to(dtype) for g in bucket])
    # Before the sum, as DDP does: sums of fp16 could overflow.
    flat.div_(divisor)
    work = None
    if dist.get_world_size(group) > 1:
        work = dist.all_reduce(flat, group=group, async_op=True)

    def finish() -> None:
        if work is not None:
            work.wait()
        if not in_place:
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    return finish
