"""Loss terms that take part in the backward pass without being added to the loss.

A term is tied to the layer's output: when the output's gradient passes through, the term's own
gradient starts with the factor that the training loop applied to the loss (1 / accumulation steps,
the fp16 loss scale). ``LossScale.of`` reads that factor from autograd: it is the gradient that
reaches the user's loss. So the result equals adding the term by hand, whatever the loop does.
A backward pass that no loop has announced may be torch.autograd.grad() of a quantity other than the
loss, with respect to the inputs for example. The term then takes part only if that pass computes
the gradient of a router parameter, as the backward pass of a loss does.

Attaching a term to an activation is Megatron-LM's idea; reading the factor from the graph is new
here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_fastmoe.errors import ConfigError


class LossScale:
    """The factor between the loss that the user returned and the loss that is differentiated.

    Unless a loss is watched, the factor is 1, which is right for a plain ``loss.backward()``.

    Attributes:
        value: the factor, None for 1.
        factor: (1,) fp64, the same in a tensor that stays the same, for compiled graphs, on the
            device of the layers. Not a scalar, which dynamo takes for a Python number and reads
            while tracing.
        in_graphs: whether a compiled graph reads ``factor``, which is written only then.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.factor = torch.ones(1, dtype=torch.float64)
        if self.factor.is_meta:  # the model is being built there; this is a number even then
            self.factor = torch.ones(1, dtype=torch.float64, device="cpu")
        self.in_graphs = False

    @property
    def is_known(self) -> bool:
        """Whether the backward pass that is running is one of a watched loss."""
        return self.value is not None

    def _store(self, grad: Tensor) -> None:
        self.value = grad.detach()
        if self.in_graphs:
            # Through .data: a graph's backward has saved it, and is to see what is written here.
            self.factor.data.copy_(self.value)

    def follow(self, module: nn.Module) -> None:
        """Puts ``factor`` where the module's parameters are: elsewhere, each read is a transfer."""
        parameter = next(module.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            self.factor = self.factor.to(parameter.device)

    def watch(self, loss: Tensor) -> None:
        """Lets a backward pass through ``loss``, however it is scaled later, set the factor.

        Of several watched tensors, the one nearest the layers counts: its hook runs last.
        """
        loss.register_hook(self._store)

    @contextmanager
    def of(self, loss: Tensor) -> Iterator[None]:
        """Watches ``loss``; on exit, the factor set by a backward pass inside is discarded."""
        self.watch(loss)
        try:
            yield
        finally:
            self.value = None
            if self.in_graphs:
                self.factor.data.fill_(1.0)


class AttachedLoss:
    """The terms of one forward pass of one layer, alive as long as that pass's graph.

    Args:
        values: name -> loss, with its graph.
        coefficients: name -> its coefficient.
        total: the sum of the losses with their coefficients; None computes it.
        scale: the factor by which the training loop multiplies the loss.
        router: the router whose losses these are.
        unknown: what is wrong if the loop multiplies it and doesn't tell ``scale``; None if it
            doesn't.

    Attributes:
        total: the same.
        unknown: the same.
        taken: True once the user has taken the terms, which are then no longer added here.
        spent: True once a backward pass has used them.
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        coefficients: dict[str, float],
        total: Tensor | None,
        scale: LossScale,
        router: nn.Module,
        unknown: str | None = None,
    ) -> None:
        self._router, self.unknown = router, unknown
        self._values, self._coefficients = values, coefficients
        if total is None:
            terms = list(self.terms.values())
            total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        self.total = total
        self.scale = scale
        self.taken = False
        self.spent = False

    @property
    def terms(self) -> dict[str, Tensor]:
        """Name -> coefficient * loss, with its graph."""
        return {name: self._coefficients[name] * value for name, value in self._values.items()}

    def takes_part(self) -> bool:
        """Whether the terms belong to what is differentiated in the backward pass that is running.

        They do unless they have been taken, or none of the router's parameters gets a gradient.
        """
        if self.taken:
            return False
        if self.scale.is_known:
            return True
        trained = [p for p in self._router.parameters() if p.requires_grad]
        return not trained or any(map(_gets_gradient, trained))


def _gets_gradient(parameter: nn.Parameter) -> bool:
    """Whether the backward pass that is running computes the gradient of a parameter."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))
    except RuntimeError:  # what it says of a leaf that torch.autograd.grad() was asked for
        return True


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, total: Tensor, attached: AttachedLoss) -> Tensor:
        ctx.attached = attached
        ctx.total_like = (total.dtype, total.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        attached: AttachedLoss = ctx.attached
        if not attached.takes_part():
            return grad, None, None
        attached.spent = True
        dtype, device = ctx.total_like
        if attached.scale.value is None:
            if attached.unknown is not None:
                raise ConfigError(attached.unknown)
            return grad, torch.ones((), dtype=dtype, device=device), None
        return grad, attached.scale.value.to(device=device, dtype=dtype).reshape(()), None


def attach(y: Tensor, attached: AttachedLoss) -> Tensor:
    """Returns ``y``; its backward pass also starts the attached terms' backward pass."""
    return _Attach.apply(y, attached.total, attached)  # type: ignore[no-any-return]


class AttachedLosses:
    """A layer's attached losses that may still be differentiated, oldest first."""

    def __init__(self) -> None:
        self._alive: list[weakref.ref[AttachedLoss]] = []

    def __reduce__(self) -> tuple[type[AttachedLosses], tuple[()]]:
        """Starts empty when copied or unpickled: a copy has run no pass of its own yet."""
        return AttachedLosses, ()

    def append(self, attached: AttachedLoss) -> None:
        """Remembers ``attached`` for as long as its graph lives."""
        self._alive = [ref for ref in self._alive if ref() is not None]
        self._alive.append(weakref.ref(attached))

    def take(self) -> list[AttachedLoss]:
        """All that have neither been taken nor differentiated yet, now marked as taken."""
        alive = [a for ref in self._alive if (a := ref()) is not None]
        found = [a for a in alive if not (a.taken or a.spent)]
        for attached in found:
            attached.taken = True
        self._alive.clear()
        return found


def is_recomputing() -> bool:
    """True inside a backward pass: activation checkpointing is replaying a forward pass there."""
    return bool(torch._C._current_graph_task_id() != -1)
