"""The interface of the grouped GEMM implementations, as the layer's steps use it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_fastmoe.ops.layer_call import LayerCall, PreActivation


class Products(Protocol):
    """Grouped GEMMs, and the operations that kernels can fuse with them.

    "Rows" are N = T*K, in expert-major order. "Gathered" is what :meth:`gather` returns for tokens
    (T, D): the rows themselves, or the tokens if these GEMMs gather as they load.
    """

    def up(self, call: LayerCall, keep_h: bool) -> tuple[PreActivation, Tensor]:
        """H, without rows unless ``keep_h``, and ``A = act(H)``, (N, F)."""

    def pre_activation(self, call: LayerCall) -> PreActivation:
        """Recomputes H of :meth:`up`, bit for bit."""

    def readable(self, grad: Tensor) -> Tensor:
        """A gradient of any strides (it may be expanded), in a layout :meth:`gather` accepts."""

    def gather(self, call: LayerCall, tokens: Tensor) -> Tensor:
        """The input of :meth:`backward_activation_` and :meth:`weight_gradient`, from tokens.

        Args:
            call: the call, for its order.
            tokens: (T, D), ``call.x`` or a :meth:`readable` gradient.
        """

    def rows(self, call: LayerCall, rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """``rows[r] @ weight[e]``, or with ``transposed`` ``rows[r] @ weight[e].T``."""

    def backward_activation_(
        self, call: LayerCall, d_out: Tensor, h: PreActivation
    ) -> tuple[Tensor, Tensor]:
        """Backward through down and the activation; overwrites ``h.rows`` with dH.

        Args:
            call: the call.
            d_out: the gathered gradient of the layer's output.
            h: H.

        Returns:
            ``w A`` (N, F), and the gradient of ``call.weights_or_ones()`` without down's bias.
        """

    def weight_gradient(
        self,
        call: LayerCall,
        gathered: Tensor,
        rows: Tensor,
        transposed: bool,
        experts: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Each expert's sum of ``outer(gathered[r], rows[r])``, or with ``transposed`` its .T.

        With ``experts``, of these alone; the rows of others are not computed with.
        """

    def weighted_sums(self, call: LayerCall, gathered: Tensor) -> Tensor:
        """(E, D): each expert's sum of ``w * gathered[r]``."""
