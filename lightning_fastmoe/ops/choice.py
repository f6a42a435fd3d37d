"""Chooses the implementation that computes a layer, for forward and backward."""

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
    """The functions of a layer. Each accepts an H from another implementation's forward."""

    def forward(self, call: LayerCall, keep_h: bool) -> tuple[Tensor, PreActivation]:
        """The output, like ``x``, and H, without rows unless ``keep_h``."""

    def pre_activation(self, call: LayerCall) -> PreActivation:
        """Recomputes H of :meth:`forward`, bit for bit."""

    def backward_(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """The gradients, given the output's gradient ``grad (T, D)``. Overwrites H."""

    def backward(
        self, call: LayerCall, grad: Tensor, h: PreActivation, wanted: Wanted
    ) -> Gradients:
        """:meth:`backward_` that leaves H intact, for compilers that can't take it otherwise."""


_TORCH_STEPS = Steps(TorchProducts())


def choose(
    call: LayerCall, h: PreActivation | None = None, *, stepwise: bool = False
) -> Implementation:
    """The implementation for ``call``.

    Forward and backward each choose, and may differ: ZeRO 3 gathers weights for the backward at
    another address, which may not be aligned as a GEMM needs.

    Args:
        call: the layer's inputs.
        h: in a backward, the available H; None if the implementation must recompute it.
        stepwise: a backward of some experts' weights, which the two operators don't have.
    """
    x, up, down = call.x, call.up, call.down
    if not x.shape[0]:
        return _TORCH_STEPS
    if call.has_biases:
        # Hopper's backward doesn't add a missing bias to H.
        if h is None or h.has_bias:
            biases = [bias for bias in (call.up_bias, call.down_bias) if bias is not None]
            if (library := hopper(x, up, down, *biases)) is not None:
                return Steps(HopperProducts(library))
        return _TORCH_STEPS
    if expert_loop.applies(x):
        return expert_loop
    if x.is_cuda:
        if (library := hopper(x, up, down)) is not None:
            return Steps(HopperProducts(library)) if stepwise else TwoOperators(library, True)
        if (
            not stepwise
            and call.has_all_pairs
            and all(grouped_mm_applies(x, weight) and is_aligned(weight) for weight in (up, down))
            and (library := native(x, up, down)) is not None
        ):
            return TwoOperators(library, False)
    return _TORCH_STEPS


def takes_more_rows(x: Tensor, *stacks: Tensor) -> bool:
    """Whether the forward pass may be given an order with more rows than the experts have.

    Args:
        x: (T, D), or others like it.
        stacks: of weights and biases.
    """
    if any(stack.dim() == 2 for stack in stacks):  # biases
        return hopper(x, *stacks) is not None
    return expert_loop.applies(x) or hopper(x, *stacks) is not None


def moves_rows(slots: int, x: Tensor, *stacks: Tensor) -> bool:
    """Whether the last product of a forward pass puts rows where they belong if all pairs have one.

    It then multiplies by the weights before it rounds, not after: an order with more rows than the
    experts have must look as if all pairs had one, too, or some bits depend on that.

    Args:
        slots: K.
        x: as in :func:`takes_more_rows`.
        stacks: as there.
    """
    has_biases = any(stack.dim() == 2 for stack in stacks)
    return slots == 1 and not has_biases and hopper(x, *stacks) is not None
