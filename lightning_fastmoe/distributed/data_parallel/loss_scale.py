"""The factor of balancing losses in a loop that scales its loss itself."""

from __future__ import annotations

from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.attached_loss import LossScale


class KnownLossScale(LossScale):
    """A loss scale that must be known in each backward pass with balancing losses.

    Otherwise a loop that divides its loss by accumulation steps, but says so nowhere, would train
    with balancing losses that many times too large, silently.

    Attributes:
        watched: backward passes whose factor was known, for compiled graphs, which can't ask.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self.watched = 0
        super().__init__()

    @property
    def is_known(self) -> bool:
        """See :class:`~lightning_fastmoe.nn.attached_loss.LossScale`."""
        return self._value is not None

    @property
    def value(self) -> Tensor | None:
        """The factor.

        Raises:
            ConfigError: if it isn't known.
        """
        if self._value is None:
            raise ConfigError(UNKNOWN)
        return self._value

    @value.setter
    def value(self, value: Tensor | None) -> None:
        self._value = value

    def watch(self, loss: Tensor) -> None:
        """See :meth:`~lightning_fastmoe.nn.attached_loss.LossScale.watch`."""
        self.watched += 1
        super().watch(loss)


UNKNOWN = (
    "loss.backward() reached balancing losses, which can't know how the loss is scaled: divided by"
    " accumulation steps, say. Call parallel.backward(loss, divisor=...) of ExpertDataParallel"
    " instead, with the loss of this batch. Or add sum(moe_losses(model).values()) to the loss by"
    " hand, or switch the losses off (load_balancing=0, z_loss=0)."
)
