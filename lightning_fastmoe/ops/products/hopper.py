"""Grouped GEMMs for compute capability 9.0 (H100, H200) that gather rows as they load them.

Separate permute, GEMM and activation kernels write and read T*K rows between steps. These kernels
load tokens' rows in place, and apply the activation or its gradient while the result is in
registers (the idea is SonicMoE's). There is no autotuning and no host sync. T tokens, D d_model,
F d_ffn, E experts, K top_k, N = T*K rows in expert order.

Environment:
    LIGHTNING_FASTMOE_HOPPER: 0 uses ``F.grouped_mm`` instead.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.layer_call import LayerCall, PreActivation
from lightning_fastmoe.ops.native import native
from lightning_fastmoe.ops.products.torch import weight_columns

MAX_EXPERTS = 2048
_ALIGNMENT_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def _is_wanted() -> bool:
    return os.environ.get("LIGHTNING_FASTMOE_HOPPER", "1") != "0"


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def hopper(*tensors: Tensor) -> Any | None:
    """The operators, if they support these tensors of tokens, rows and weights, else None.

    They support contiguous bf16 or fp16 tensors of one dtype on a GPU of compute capability 9.0
    that start at a multiple of 16 bytes and whose rows are multiples of 16 bytes.

    Args:
        tensors: all of the call's tensors of two or three dimensions; of three: weights (E, ., .).
    """
    first = tensors[0]
    if first.device.type != "cuda" or first.dtype not in _DTYPES or not _is_wanted():
        return None
    if _capability(first.device.index) != (9, 0):
        return None
    if not all(_fits(tensor, first.dtype) for tensor in tensors):
        return None
    if (library := native(*tensors)) is None:
        return None
    # It may have been compiled only for older GPUs.
    return library if library.hopper_available(first.device.index) else None


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    if tensor.dtype != dtype or not tensor.is_contiguous():
        return False
    if tensor.dim() == 3 and not 1 <= tensor.shape[0] <= MAX_EXPERTS:
        return False
    start = tensor.storage_offset() * tensor.element_size()
    row = tensor.shape[-1] * tensor.element_size()
    return start % _ALIGNMENT_BYTES == 0 and row > 0 and row % _ALIGNMENT_BYTES == 0


def up_forward(
    library: Any,
    x: Tensor,
    order: Tensor,
    top_k: int,
    offsets: Tensor,
    up: Tensor,
    activation: str,
    bias: Tensor | None = None,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """``h[r] = up[e] x[order[r] // top_k] (+ bias[e])`` and ``a = act(h)``, each rounded once.

    Args:
        library: what :func:`hopper` returned for ``x`` and ``up``.
        x: (T, D).
        order: (N,) int64, the flat (token, slot) pair of each row.
        top_k: K.
        offsets: (E,) int32, the running sum of the experts' row counts.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D).
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
        bias: (E, 2F) or (E, F), contiguous, or None.
        keep_h: whether a backward will need ``h``.

    Returns:
        ``h`` (N, 2F) or (N, F), without rows unless it is kept, and ``a`` (N, F).
    """
    return library.hopper_up_forward(  # type: ignore[no-any-return]
        x, order, top_k, offsets, up, bias, activation, keep_h
    )


def backward_activation_(
    library: Any,
    grad: Tensor,
    order: Tensor,
    offsets: Tensor,
    down: Tensor,
    h: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Computes the gradient of ``h`` from the layer's gradient, and overwrites ``h`` with it.

    With ``d_act[r] = grad[order[r] // K] @ down[e]``, row r's routing weight w and ``A = act(h)``,
    ``h`` becomes ``w * d_act * act'(h)``.

    Args:
        library: what :func:`hopper` returned for ``grad``, ``down`` and ``h``.
        grad: (T, D).
        order: (N,) int64.
        offsets: (E,) int32.
        down: (E, D, F).
        h: (N, 2F) or (N, F), of the forward. Overwritten.
        weights: (T, K) fp32, contiguous.
        activation: as in the forward.

    Returns:
        ``w * A`` (N, F), and ``<A, d_act>`` (T, K) fp32.
    """
    return library.hopper_backward_activation_(  # type: ignore[no-any-return]
        grad, order, offsets, down, h, weights, activation
    )


def rows_product(
    library: Any,
    rows: Tensor,
    offsets: Tensor,
    weight: Tensor,
    transposed: bool,
    order: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """``rows[r] @ weight[e]``, or with ``transposed`` ``rows[r] @ weight[e].T``.

    With ``order``, the product goes to row ``order[r]`` of the result, times ``weights[order[r]]``:
    with one expert per token, no sum over rows is needed.

    Args:
        library: what :func:`hopper` returned for ``rows`` and ``weight``.
        rows: (N, k).
        offsets: (E,) int32.
        weight: (E, k, width), or (E, width, k) if transposed; width a multiple of 8.
        transposed: which of the two.
        order: (N,) int64, a permutation, or None.
        weights: (N, 1) fp32, contiguous; only with ``order``.

    Returns:
        (N, width).
    """
    return library.hopper_rows_product(  # type: ignore[no-any-return]
        rows, offsets, weight, transposed, order, weights
    )


def weight_gradient(
    library: Any,
    gathered: Tensor,
    order: Tensor,
    top_k: int,
    rows: Tensor,
    offsets: Tensor,
    transposed: bool,
) -> Tensor:
    """The sum over each expert's rows of ``outer(gathered[order[r] // top_k], rows[r])``.

    Args:
        library: what :func:`hopper` returned for ``gathered`` and ``rows``.
        gathered: (T, m).
        order: (N,) int64.
        top_k: K.
        rows: (N, n).
        offsets: (E,) int32.
        transposed: whether each expert's result is (n, m) rather than (m, n).

    Returns:
        (E, m, n) or (E, n, m); zeros for an expert without rows.
    """
    return library.hopper_weight_gradient(  # type: ignore[no-any-return]
        gathered, order, top_k, rows, offsets, transposed
    )


class HopperProducts:
    """Hopper's :class:`~lightning_fastmoe.ops.products.interface.Products`; H includes its bias.

    The GEMM adds the bias in registers. The backward requires an H that includes it.

    Args:
        library: what :func:`hopper` returned for the call's tensors.
    """

    __slots__ = ("_library",)

    def __init__(self, library: Any) -> None:
        self._library = library

    def up(self, call: LayerCall, keep_h: bool) -> tuple[PreActivation, Tensor]:
        h, a = up_forward(
            *(self._library, call.x, call.pairs(), call.top_k, call.offsets, call.up),
            *(call.activation, call.up_bias, keep_h),
        )
        return PreActivation(h, True), a

    def pre_activation(self, call: LayerCall) -> PreActivation:
        return self.up(call, True)[0]

    def readable(self, grad: Tensor) -> Tensor:
        return grad.contiguous()

    def gather(self, call: LayerCall, tokens: Tensor) -> Tensor:
        return tokens

    def rows(self, call: LayerCall, rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        return rows_product(self._library, rows, call.offsets, weight, transposed)

    def backward_activation_(
        self, call: LayerCall, d_out: Tensor, h: PreActivation
    ) -> tuple[Tensor, Tensor]:
        assert h.has_bias or call.up_bias is None
        return backward_activation_(
            *(self._library, d_out, call.pairs(), call.offsets, call.down, h.rows),
            *(call.weights_or_ones(), call.activation),
        )

    def weight_gradient(
        self,
        call: LayerCall,
        gathered: Tensor,
        rows: Tensor,
        transposed: bool,
        experts: tuple[int, ...] | None = None,
    ) -> Tensor:
        pairs, offsets = call.pairs(), call.offsets
        if experts is not None and len(experts) < call.offsets.shape[0]:
            if not experts:
                m, n = gathered.shape[1], rows.shape[1]
                return rows.new_empty(0, *((n, m) if transposed else (m, n)))
            order, offsets = call.rows_first(experts)
            pairs, rows = pairs[order], rows[order]
        return weight_gradient(
            self._library, gathered, pairs, call.top_k, rows, offsets, transposed
        )

    def weighted_sums(self, call: LayerCall, gathered: Tensor) -> Tensor:
        """Also a GEMM: with a few extra columns that hold the weights."""
        weights = call.weights_or_ones().reshape(-1).index_select(0, call.pairs())
        sums = self.weight_gradient(call, gathered, weight_columns(weights, gathered), False)
        wide = kernels.accumulation_dtype(gathered.dtype)
        return sums.sum(-1, dtype=wide).to(gathered.dtype)


__all__ = [
    "MAX_EXPERTS",
    "HopperProducts",
    "backward_activation_",
    "hopper",
    "rows_product",
    "up_forward",
    "weight_gradient",
]
