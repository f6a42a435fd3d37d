"""The layer as two C++ operators, so that launching short kernels doesn't wait for Python.

csrc/layer.cpp implements the steps of :mod:`~lightning_fastmoe.ops.steps` for layers without biases
in which each grouped GEMM is one kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_fastmoe.ops.layer_call import Gradients, LayerCall, PreActivation, Wanted


class TwoOperators:
    """The layer by the operators of ``library``.

    Args:
        library: the compiled kernels.
        on_hopper: whether to use the GEMMs for compute capability 9.0. Without them the results are
            bit-identical to those of :class:`~lightning_fastmoe.ops.steps.Steps`.
    """

    __slots__ = ("library", "on_hopper")

    def __init__(self, library: Any, on_hopper: bool) -> None:
        self.library, self.on_hopper = library, on_hopper

    def forward(self, call: LayerCall, keep_h: bool) -> tuple[Tensor, PreActivation]:
        """The output, like ``x``, and H, without rows unless ``keep_h``."""
        out, h = self.library.expert_layer(
            *(call.x, call.weights, call.up, call.down, call.order, call.inverse, call.offsets),
            *(call.activation, keep_h, self.on_hopper),
        )
        return out, PreActivation(h, False)

    def pre_activation(self, call: LayerCall) -> PreActivation:
        """Recomputes H by the whole of :meth:`forward`, for identical bits."""
        return self.forward(call, True)[1]

    def backward_(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """The gradients, given the output's gradient ``grad (T, D)``. Overwrites H."""
        return self._backward(call, grad, h, wanted, keep_h=False)

    def backward(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """:meth:`backward_` that leaves H intact."""
        return self._backward(call, grad, h, wanted, keep_h=True)

    def _backward(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted, *, keep_h: bool
    ) -> Gradients:
        d_x, d_weights, d_up, d_down = self.library.expert_layer_backward_(
            *(
                grad.contiguous(),
                call.x,
                h.rows,
                call.weights_or_ones(),
                call.up,
                call.down,
                call.order,
            ),
            *(call.inverse, call.tokens_per_expert, call.offsets, call.activation),
            *(wanted.x, wanted.up, wanted.down, self.on_hopper, keep_h),
        )
        return Gradients(
            d_x if wanted.x else None,
            call.of_pairs_with_rows(d_weights) if wanted.weights else None,
            d_up if wanted.up else None,
            d_down if wanted.down else None,
        )
