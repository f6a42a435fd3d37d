"""All experts of one rank: grouped GEMM, activation, grouped GEMM."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.activation import apply_activation

_ALIGNMENT_BYTES = 16  # F.grouped_mm refuses row strides that are not multiples of this
_COLUMNS = _ALIGNMENT_BYTES // 2  # the fewest that a product of half types takes


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm refuses expanded (stride-0) gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def grouped_mm_applies(x: Tensor, weight: Tensor) -> bool:
    """Whether ``F.grouped_mm`` serves these operands as one kernel, without a host sync.

    On CUDA that is bf16 on compute capability 9.0 and above; on the CPU fp32 and bf16. Both sides
    of each product need rows of whole 16-byte units, in forward and backward alike.

    Args:
        x: (N, D).
        weight: (E, M, D).
    """
    return _one_kernel(x, *weight.shape[1:])


def _one_kernel(x: Tensor, *widths: int) -> bool:
    """:func:`grouped_mm_applies` to products of the dtype and device of ``x``, by row lengths."""
    if any((n * x.element_size()) % _ALIGNMENT_BYTES for n in widths):
        return False
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and _capability(x.device.index) >= (9, 0)
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def grouped_linear(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """``x[rows of e] @ weight[e].T`` for every expert e.

    Args:
        x: (N, D), rows grouped by expert; N is the sum of the counts.
        weight: (E, M, D).
        tokens_per_expert: (E,) int64, zeros allowed.

    Returns:
        (N, M). An expert without tokens gets a gradient of zeros.
    """
    if x.shape[0] and grouped_mm_applies(x, weight):
        offsets = torch.cumsum(tokens_per_expert, 0).to(torch.int32)
        weight = weight if is_aligned(weight) else weight.clone()
        out = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offsets)
        return _Contiguous.apply(out)  # type: ignore[no-any-return]
    return grouped_linear_loop(x, weight, tokens_per_expert)


def grouped_linear_loop(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """:func:`grouped_linear` as one product per expert; reads the counts on the host."""
    chunks = x.split(tokens_per_expert.tolist())
    # unbind's gradient stacks one slice per expert, zeros for the empty ones.
    return torch.cat([c @ w.T for c, w in zip(chunks, weight.unbind(0), strict=True)])


def grouped_product(
    x: Tensor, weight: Tensor, tokens_per_expert: Tensor, offsets: Tensor
) -> Tensor:
    """``x[rows of e] @ weight[e]`` for every expert e, unknown to autograd.

    Args:
        x: (N, D), rows grouped by expert.
        weight: (E, D, M), or the transpose of a contiguous (E, M, D).
        tokens_per_expert: (E,) int64.
        offsets: (E,) int32, their running sum.

    Returns:
        (N, M).
    """
    if not x.shape[0]:
        return x.new_empty(0, weight.shape[2])
    if grouped_mm_applies(x, weight):
        return F.grouped_mm(x, weight if is_aligned(weight) else weight.clone(), offs=offsets)
    chunks = x.split(tokens_per_expert.tolist())
    return torch.cat([c @ w for c, w in zip(chunks, weight.unbind(0), strict=True)])


def grouped_outer_product(
    a: Tensor, b: Tensor, tokens_per_expert: Tensor, offsets: Tensor
) -> Tensor:
    """``a[rows of e].T @ b[rows of e]`` for every expert e: the gradient of stacked weights.

    Args:
        a: (N, M), rows grouped by expert.
        b: (N, P).
        tokens_per_expert: (E,) int64.
        offsets: (E,) int32, their running sum.

    Returns:
        (E, M, P), zeros for an expert without tokens.
    """
    shape = (tokens_per_expert.shape[0], a.shape[1], b.shape[1])
    if not a.shape[0]:
        return a.new_zeros(shape)
    if _one_kernel(a, *shape[1:]):
        out = F.grouped_mm(a.T, b, offs=offsets)
        # A product over no rows may leave the memory as it was.
        return kernels.zero_empty_experts_(out, tokens_per_expert)
    out = a.new_empty(shape)
    counts = tokens_per_expert.tolist()
    for e, (rows, columns) in enumerate(zip(a.split(counts), b.split(counts), strict=True)):
        torch.mm(rows.T, columns, out=out[e])
    return out


def expert_sums(
    rows: Tensor, tokens_per_expert: Tensor, offsets: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """``sum of weights[r] * rows[r] over the rows r of e`` for every expert e, in fixed order.

    A grouped product with a few columns, so that long sums run in fp32 and nothing is scattered.

    Args:
        rows: (N, M), grouped by expert.
        tokens_per_expert: (E,) int64.
        offsets: (E,) int32, their running sum.
        weights: (N,), or None for ones.

    Returns:
        (E, M) in the dtype of ``rows``, zeros for an expert without rows.
    """
    columns = weight_columns(weights, rows)
    sums = grouped_outer_product(rows, columns, tokens_per_expert, offsets)
    return sums[..., :2].sum(dim=-1, dtype=kernels.accumulation_dtype(rows.dtype)).to(rows.dtype)


def weight_columns(weights: Tensor | None, rows: Tensor) -> Tensor:
    """(N, 8) whose sum over columns is each row's weight, to twice the precision of ``rows``.

    Args:
        weights: (N,), or None for ones.
        rows: (N, M), for their number, dtype and device.
    """
    columns = rows.new_zeros(rows.shape[0] if weights is None else weights.shape[0], _COLUMNS)
    if weights is None:
        columns[:, 0] = 1
    else:
        columns[:, 0] = weights
        # What a half precision loses of the weight, in a column that would be idle.
        columns[:, 1] = weights - columns[:, 0]
    return columns


def is_aligned(weight: Tensor) -> bool:
    """Whether grouped_mm takes the address: a view into one of ZeRO's flat buffers may be odd."""
    return weight.storage_offset() * weight.element_size() % _ALIGNMENT_BYTES == 0


class _RowBias(torch.autograd.Function):
    """Each row's bias; the gradient is a product with a 0/1 matrix, which needs no scattering."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(expert)
        ctx.num_experts = bias.shape[0]
        return bias.index_select(0, expert)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (expert,) = ctx.saved_tensors
        experts = torch.arange(ctx.num_experts, device=expert.device)
        return (experts.unsqueeze(1) == expert).to(grads[0].dtype) @ grads[0], None


def _row_bias(bias: Tensor, tokens_per_expert: Tensor, rows: int) -> Tensor:
    """(E, M) -> (N, M): the bias of the expert that each row belongs to."""
    ends = torch.cumsum(tokens_per_expert, 0)
    expert = torch.searchsorted(ends, torch.arange(rows, device=bias.device), right=True)
    return _RowBias.apply(bias, expert)  # type: ignore[no-any-return]


def grouped_mlp(
    x: Tensor,
    tokens_per_expert: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The FFN of every expert on its own rows.

    Args:
        x: (N, D), rows grouped by expert.
        tokens_per_expert: (E,) int64 with sum N.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D).
        down: (E, D, F).
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
        up_bias: (E, 2F) or (E, F).
        down_bias: (E, D).

    Returns:
        (N, D) in the dtype of ``x``.
    """
    h = grouped_linear(x, up, tokens_per_expert)
    if up_bias is not None:
        h = h + _row_bias(up_bias, tokens_per_expert, x.shape[0])
    y = grouped_linear(apply_activation(h, activation), down, tokens_per_expert)
    if down_bias is not None:
        y = y + _row_bias(down_bias, tokens_per_expert, x.shape[0])
    return y
