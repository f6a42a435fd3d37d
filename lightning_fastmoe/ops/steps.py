"""Forward and backward of a layer, independent of the grouped GEMM implementation.

Separate permute, grouped MLP and unpermute operations save the gathered tokens, the pre-activation
H, the activation A and the expert outputs Y for the backward. Here only x and H are saved (the idea
is SonicMoE's). For a row r of token t with expert e and routing weight w, forward and backward are

    H[r]   = up[e] @ x[t] + up_bias[e]
    A[r]   = act(H[r])
    Y[r]   = down[e] @ A[r] + down_bias[e]
    out[t] = sum of w * Y[r] over the K rows of t

    d_down_bias = sum_r w dO[t]
    dA'[r]      = dO[t] @ down[e]       the gradient that A would have if w were 1
    dw          = <A[r], dA'[r]> + <down_bias[e], dO[t]>        so Y is not needed
    dH[r]       = w * dA'[r] * act'(H[r])
    d_down      = sum_r dO[t] (w A[r])^T                        nor is the weighted dO
    d_up_bias   = sum_r dH[r]
    dx[t]       = sum of dH[r] @ up[e] over the K rows of t
    d_up        = sum_r dH[r] x[t]^T

dH overwrites H, and w A overwrites dA'. T tokens, D d_model, F d_ffn, E experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe.ops import kernels
from lightning_fastmoe.ops.layer_call import (
    Gradients,
    LayerCall,
    PreActivation,
    Wanted,
    index_of,
)
from lightning_fastmoe.ops.products.interface import Products
from lightning_fastmoe.ops.products.torch import expert_sums


class Steps:
    """The layer as a sequence of separate steps.

    Args:
        products: the grouped GEMM implementation, which decides whether H includes its bias.
    """

    __slots__ = ("products",)

    def __init__(self, products: Products) -> None:
        self.products = products

    def forward(self, call: LayerCall, keep_h: bool) -> tuple[Tensor, PreActivation]:
        """The output, like ``x``, and H, without rows unless ``keep_h``."""
        h, a = self.products.up(call, keep_h)
        y = self.products.rows(call, a, call.down, True)
        del a
        if call.inverse is None and call.down_bias is None:
            return y, h
        places = call.pairs() if call.inverse is None else call.inverse
        out = kernels.sum_rows(y, places, call.weights, call.top_k, call.down_bias, call.offsets)
        return out, h

    def pre_activation(self, call: LayerCall) -> PreActivation:
        """Recomputes H of :meth:`forward`, bit for bit."""
        return self.products.pre_activation(call)

    def backward_(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """The gradients, given the output's gradient ``grad (T, D)``. Overwrites H."""
        products, d_h = self.products, h.rows
        d_x = d_up = d_down = d_up_bias = d_down_bias = None
        some = wanted.experts
        grad = products.readable(grad)
        d_out = products.gather(call, grad)
        if wanted.down_bias:
            d_down_bias = _of(some, products.weighted_sums(call, d_out))
        weighted_act, d_weights = products.backward_activation_(call, d_out, h)
        if wanted.weights and call.down_bias is not None:
            d_weights += _bias_dots(call, grad, d_weights)
        d_weights = call.of_pairs_with_rows(d_weights)
        del grad
        if wanted.down:
            d_down = products.weight_gradient(call, d_out, weighted_act, False, some)
        del d_out, weighted_act
        if wanted.up_bias:
            d_up_bias = _of(some, expert_sums(d_h, call.tokens_per_expert, call.offsets))
        # First d_x, whose N rows of D are freed before the gradient of up is allocated.
        if wanted.x:
            d_x = products.rows(call, d_h, call.up, False)
            if call.inverse is not None:
                d_x = kernels.sum_rows(d_x, call.inverse, None, call.top_k)
        if wanted.up:
            tokens = products.gather(call, call.x)
            d_up = products.weight_gradient(call, tokens, d_h, True, some)
        return Gradients(
            d_x, d_weights if wanted.weights else None, d_up, d_down, d_up_bias, d_down_bias
        )

    def backward(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """:meth:`backward_` that leaves H intact, by copying it."""
        return self.backward_(call, grad, PreActivation(h.rows.clone(), h.has_bias), wanted)


def _of(experts: tuple[int, ...] | None, sums: Tensor) -> Tensor:
    """The rows of some experts, as many numbers as one token has: not worth skipping the others."""
    if experts is None:
        return sums
    return sums[index_of(experts, sums.device)]


def _bias_dots(call: LayerCall, grad: Tensor, like: Tensor) -> Tensor:
    """(T, K): ``<down_bias[expert of the pair], grad[t]>``, the bias's part of d_weights."""
    assert call.inverse is not None
    assert call.down_bias is not None
    by_expert = grad @ call.down_bias.T.to(grad.dtype)  # (T, E)
    offsets = call.offsets.to(call.inverse.dtype)
    experts = torch.searchsorted(offsets, call.inverse, right=True)
    return by_expert.gather(1, experts.view(like.shape)).to(like.dtype)
