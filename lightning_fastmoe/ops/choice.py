"""Which implementation computes a layer: decided here, for forward and backward."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_fastmoe.ops import expert_loop
from lightning_fastmoe.ops.layer_call import Gradients, LayerCall, PreActivation, Wanted
from lightning_fastmoe.ops.native import native
from lightning_fastmoe.ops.products.hopper import HopperProducts, hopper
from lightning_fastmoe.ops.products.torch import TorchProducts, grouped_mm_applies, is_aligned
from lightning_fastmoe.ops.steps import Steps
from lightning_fastmoe.ops.two_operators import TwoOperators


class Implementation(Protocol):
    """The three functions of a layer. Any of them takes what another's forward left."""

    def forward(self, call: LayerCall, keep_h: bool) -> tuple[Tensor, PreActivation]:
        """The output, like ``x``, and H, without rows unless ``keep_h``."""

    def pre_activation(self, call: LayerCall) -> PreActivation:
        """H of :meth:`forward` again, the same bits."""

    def backward_(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """The gradients, from that of the output, ``grad (T, D)``. Overwrites H."""


_TORCH_STEPS = Steps(TorchProducts())


def choose(call: LayerCall, h: PreActivation | None = None) -> Implementation:
    """The implementation for ``call``.

    Forward and backward ask anew, and may get another answer: ZeRO 3 gathers weights for the
    backward elsewhere, perhaps where a product can't read them.

    Args:
        call: the layer's inputs.
        h: in a backward, the H that is there; None if the implementation is to make its own.
    """
    x, up, down = call.x, call.up, call.down
    if not x.shape[0]:
        return _TORCH_STEPS
    if call.has_biases:
        # Hopper's backward adds no bias to an H that came without.
        if h is None or h.has_bias:
            biases = [bias for bias in (call.up_bias, call.down_bias) if bias is not None]
            if (library := hopper(x, up, down, *biases)) is not None:
                return Steps(HopperProducts(library))
        return _TORCH_STEPS
    if expert_loop.applies(x):
        return expert_loop
    if x.is_cuda:
        if (library := hopper(x, up, down)) is not None:
            return TwoOperators(library, True)
        if (
            all(grouped_mm_applies(x, weight) and is_aligned(weight) for weight in (up, down))
            and (library := native(x, up, down)) is not None
        ):
            return TwoOperators(library, False)
    return _TORCH_STEPS
