"""What may be set on a layer between two steps, without building anything anew."""

from __future__ import annotations

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.capacity import CapacityOver, DropBy, check_factor, check_options
from lightning_fastmoe.nn.moe_options import check_takes_capacity
from lightning_fastmoe.nn.router import Router


class LayerSettings(nn.Module):
    """The settings of a MoE layer; set them alike on all ranks.

    Attributes:
        loss_coefficients: name of a loss -> its coefficient. Looked at in each training pass, which
            raises a ConfigError for one that is negative, or for a loss that the router hasn't.
    """

    router: nn.Module
    num_experts: int
    loss_coefficients: dict[str, float]
    _capacity_over: CapacityOver
    _drop_by: DropBy
    _capacity_factors: tuple[float | None, float | None]

    @property
    def top_k(self) -> int | None:
        """Experts per token, K; None if that is not the router's idea. May be set."""
        name = "_top_k" if isinstance(self.router, Router) else "top_k"
        k: int | None = getattr(self.router, name, None)
        return k

    @top_k.setter
    def top_k(self, value: int) -> None:
        if self.top_k is None:
            raise ConfigError(f"top_k={value!r}: {type(self.router).__name__} has no top_k.")
        self.router.top_k = value  # type: ignore[assignment]

    @property
    def capacity_factor(self) -> float | None:
        """In training; None is dropless. May be set."""
        return self._capacity_factors[0]

    @capacity_factor.setter
    def capacity_factor(self, value: float | None) -> None:
        check_takes_capacity(self.router, check_factor("capacity_factor", value))
        self._capacity_factors = (value, self._capacity_factors[1])

    @property
    def eval_capacity_factor(self) -> float | None:
        """In evaluation; None is dropless. May be set."""
        return self._capacity_factors[1]

    @eval_capacity_factor.setter
    def eval_capacity_factor(self, value: float | None) -> None:
        check_takes_capacity(self.router, check_factor("eval_capacity_factor", value))
        self._capacity_factors = (self._capacity_factors[0], value)

    @property
    def capacity_over(self) -> CapacityOver:
        """Whose tokens share an expert's slots: the "rank" or "global" batch's. May be set."""
        return self._capacity_over

    @capacity_over.setter
    def capacity_over(self, value: CapacityOver) -> None:
        check_options(capacity_over=value)
        self._capacity_over = value

    @property
    def drop_by(self) -> DropBy:
        """Who keeps their place: by "position" or by "score". May be set."""
        return self._drop_by

    @drop_by.setter
    def drop_by(self, value: DropBy) -> None:
        check_options(drop_by=value)
        self._drop_by = value

    @property
    def uses_global_batch(self) -> bool:
        """Whether forward passes, as the layer is set now, exchange counts over all ranks."""
        router = self.router
        limited = self.capacity_over == "global" and self._capacity_factors != (None, None)
        asks = isinstance(router, Router) and (router.random or router.uses_batch)
        return asks or limited or self.loss_coefficients["global_balancing"] > 0

    @property
    def exchanged_counts(self) -> int:
        """The most counts that one such exchange may hold; a callback may raise top_k up to 8."""
        slots = min(self.num_experts, max(self.top_k or 1, 8))
        many = self.capacity_over == "global" or getattr(self.router, "uses_batch", False)
        return (self.num_experts + 1) * slots + 1 if many else self.num_experts + 1
