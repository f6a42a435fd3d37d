"""The layer's grouped GEMMs by ``F.grouped_mm`` where it is one kernel, else expert by expert.

Separate kernels gather rows and apply the activation.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.layer_call import LayerCall, PreActivation

_ALIGNMENT_BYTES = 16  # F.grouped_mm refuses row strides that are not multiples of this
_COLUMNS = _ALIGNMENT_BYTES // 2  # the smallest width of a GEMM in half precision


class TorchProducts:
    """PyTorch's :class:`~lightning_fastmoe.ops.products.interface.Products`; H lacks its bias."""

    __slots__ = ()

    def up(self, call: LayerCall, keep_h: bool) -> tuple[PreActivation, Tensor]:
        h = self.pre_activation(call)
        a = kernels.activation(h.rows, call.activation, call.up_bias, call.offsets)
        return (h if keep_h else PreActivation(h.rows.new_empty(0, h.rows.shape[1]), False)), a

    def pre_activation(self, call: LayerCall) -> PreActivation:
        return PreActivation(self.rows(call, self.gather(call, call.x), call.up, True), False)

    def readable(self, grad: Tensor) -> Tensor:
        return grad

    def gather(self, call: LayerCall, tokens: Tensor) -> Tensor:
        if call.order is None or call.inverse is None:
            return tokens.contiguous()
        return kernels.permute_rows(tokens, call.order, call.inverse, call.top_k)

    def rows(self, call: LayerCall, rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        matrices = weight.transpose(1, 2) if transposed else weight
        return grouped_product(rows, matrices, call.tokens_per_expert, call.offsets)

    def backward_activation_(
        self, call: LayerCall, d_out: Tensor, h: PreActivation
    ) -> tuple[Tensor, Tensor]:
        d_act = self.rows(call, d_out, call.down, False)
        bias = None if h.has_bias else call.up_bias
        used = call.weights_or_ones()
        d_weights = kernels.activation_backward_(
            h.rows, d_act, used, call.order, call.activation, bias, call.offsets
        )
        return d_act, d_weights  # d_act now holds the weighted activation

    def weight_gradient(
        self,
        call: LayerCall,
        gathered: Tensor,
        rows: Tensor,
        transposed: bool,
        experts: tuple[int, ...] | None = None,
    ) -> Tensor:
        a, b = (rows, gathered) if transposed else (gathered, rows)
        if experts is None or len(experts) == call.offsets.shape[0]:
            return grouped_outer_product(a, b, call.tokens_per_expert, call.offsets)
        if not experts:
            return a.new_empty(0, a.shape[1], b.shape[1])
        if not a.is_cuda:  # reading counts costs nothing there
            return _some_outer_products(a, b, call.tokens_per_expert, experts)
        order, ends = call.rows_first(experts)
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.int64)
        return grouped_outer_product(a[order], b[order], counts, ends)

    def weighted_sums(self, call: LayerCall, gathered: Tensor) -> Tensor:
        weights = call.weights
        if weights is not None:
            weights = weights.reshape(-1).index_select(0, call.pairs())
        return expert_sums(gathered, call.tokens_per_expert, call.offsets, weights=weights)


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def grouped_mm_applies(x: Tensor, weight: Tensor) -> bool:
    """Whether ``F.grouped_mm`` runs these operands as one kernel, without a host sync.

    On CUDA that is bf16 on compute capability 9.0 and above; on the CPU fp32 and bf16. Both sides
    of each product need rows of whole 16-byte units, in forward and in backward.

    Args:
        x: (N, D).
        weight: (E, M, D).
    """
    return _one_kernel(x, *weight.shape[1:])


def _one_kernel(x: Tensor, *widths: int) -> bool:
    """:func:`grouped_mm_applies` by row lengths, for the dtype and device of ``x``."""
    if any((n * x.element_size()) % _ALIGNMENT_BYTES for n in widths):
        return False
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and _capability(x.device.index) >= (9, 0)
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def grouped_product(
    x: Tensor, weight: Tensor, tokens_per_expert: Tensor, offsets: Tensor
) -> Tensor:
    """``x[rows of e] @ weight[e]`` for every expert e; not differentiable.

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
    chunks = x.split(counts_on_host(tokens_per_expert))
    return torch.cat([c @ w for c, w in zip(chunks, weight.unbind(0), strict=True)])


def grouped_outer_product(
    a: Tensor, b: Tensor, tokens_per_expert: Tensor, offsets: Tensor
) -> Tensor:
    """``a[rows of e].T @ b[rows of e]`` for every expert e: the gradient of stacked weights.

    Args:
        a: (N, M), rows grouped by expert; any after the last expert's don't count.
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
        # A GEMM over zero rows may leave its output uninitialised.
        return kernels.zero_empty_experts_(out, tokens_per_expert)
    out = a.new_empty(shape)
    start = 0
    for e, count in enumerate(counts_on_host(tokens_per_expert)):
        torch.mm(a[start : start + count].T, b[start : start + count], out=out[e])
        start += count
    return out


def _some_outer_products(
    a: Tensor, b: Tensor, tokens_per_expert: Tensor, experts: tuple[int, ...]
) -> Tensor:
    """:func:`grouped_outer_product` of some experts, one by one: (experts, M, P)."""
    counts = counts_on_host(tokens_per_expert)
    out = a.new_empty(len(experts), a.shape[1], b.shape[1])
    rows, columns = a.split(counts), b.split(counts)
    for place, e in enumerate(experts):
        torch.mm(rows[e].T, columns[e], out=out[place])
    return out


def expert_sums(
    rows: Tensor, tokens_per_expert: Tensor, offsets: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """``sum of weights[r] * rows[r] over the rows r of e`` for every expert e, in fixed order.

    A grouped GEMM with a few columns, so that long sums run in fp32 without a scatter.

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
    """(N, 8) columns that sum to each row's weight, to twice the precision of ``rows``.

    Args:
        weights: (N,), or None for ones.
        rows: (N, M), for their number, dtype and device.
    """
    columns = rows.new_zeros(rows.shape[0] if weights is None else weights.shape[0], _COLUMNS)
    if weights is None:
        columns[:, 0] = 1
    else:
        columns[:, 0] = weights
        # The rounding error of the weight in half precision goes to a second column.
        columns[:, 1] = weights - columns[:, 0]
    return columns


def is_aligned(weight: Tensor) -> bool:
    """Whether grouped_mm accepts the address: a view into ZeRO's flat buffers may be unaligned."""
    return weight.storage_offset() * weight.element_size() % _ALIGNMENT_BYTES == 0


def counts_on_host(tokens_per_expert: Tensor) -> list[int]:
    """``tokens_per_expert (E,)`` as numbers, for products that are computed expert by expert.

    Raises:
        ConfigError: while a CUDA graph is recorded, which would go on with the same counts.
    """
    if tokens_per_expert.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "A MoE layer in a CUDA graph: these experts are computed one by one, for which the host"
            " must know how many tokens each has. CUDA graphs need experts in bf16 (fp16 from"
            " compute capability 9.0 on): set the Trainer's precision, or compile without"
            " mode='reduce-overhead' (cuda_graphs=False)."
        )
    counts: list[int] = tokens_per_expert.tolist()
    return counts
