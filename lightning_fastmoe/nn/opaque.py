"""The experts of a layer, sharded over ranks, as one operator for ``torch.compile``.

An exchange waits for other ranks and reads counts on the host, so no compiler can trace it; but one
can leave it in its graph as it is, with the router before and the losses after it compiled. The
operator runs the layer's schedule as it runs without ``torch.compile``, and keeps what its backward
goes back through: a function of the schedule where it has one, else the autograd graph of the pass,
which takes the host longer. Another operator calls a layer's observers.

Graphs are shared by layers, and an operator takes tensors: so a number in a tensor stands for the
layer, and another for the pass.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.attached_loss import is_recomputing
from lightning_fastmoe.nn.hooks import has_hooks
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.observers import show_observers
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.nn.runtime_ops import ON_HOST
from lightning_fastmoe.nn.schedule import Back
from lightning_fastmoe.ops.operator import differentiate, fake_of, operator

NAMESPACE = "lightning_fastmoe_opaque"

_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")

# Not to be run again in the backward pass where a compiler finds that cheap.
_TAGS = (torch.Tag.nondeterministic_seeded, *ON_HOST)


class Reference:
    """Stands for a layer among the inputs of a graph.

    Args:
        layer: a :class:`~lightning_fastmoe.nn.MoE` that is connected to other ranks.

    Attributes:
        handle: () int64 on the CPU.
        observed: () int64 on the CPU, passes that observers have seen. Graphs write to it, so no
            compiler drops what shows them the routing.
    """

    _numbers = itertools.count(1)
    _layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __init__(self, layer: Any) -> None:
        number = next(self._numbers)
        self._layers[number] = layer
        self.handle, self.observed = _scalar(number), _scalar(0)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the layer must not run the experts of this one.
        return _reference_of_a_copy, ()

    @classmethod
    def layer(cls, handle: Tensor) -> Any:
        """The layer of a handle.

        Raises:
            ConfigError: if it is gone, or a copy that was never connected.
        """
        found = cls._layers.get(int(handle))
        if found is None:
            raise ConfigError(
                "A compiled graph runs a MoE layer that was deleted, or copied while its experts"
                " were sharded over ranks. Connect the copy by a strategy of its own."
            )
        return found


def _scalar(number: int) -> Tensor:
    """On the CPU, whatever the default device is."""
    return torch.tensor(number, device="cpu")


def _reference_of_a_copy() -> Reference:
    reference = Reference.__new__(Reference)
    reference.handle, reference.observed = _scalar(0), _scalar(0)
    return reference


class _Pass(np.ndarray[Any, Any]):
    """A number whose memory owns a pass: it is freed with the last tensor that shows the number.

    So a pass lives as long as what a graph saves for its backward, also where that is dropped.
    """

    _numbers = itertools.count(1)
    _alive: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()

    back: Back

    @classmethod
    def keep(cls, back: Back) -> Tensor:
        """A tensor (1,) int64 that stands for a pass and keeps ``back``."""
        number = next(cls._numbers)
        memory: NDArray[np.int64] = np.array([number])
        one = memory.view(cls)
        one.back = back
        cls._alive[number] = one
        return torch.from_numpy(one)

    @classmethod
    def back_of(cls, token: Tensor) -> Back:
        """What :meth:`keep` was given.

        Raises:
            ConfigError: if the pass is gone: the token is a copy, not the tensor that kept it.
        """
        one = cls._alive.get(int(token))
        if one is None:
            raise ConfigError(
                "What a MoE layer inside a compiled graph saved for its backward pass was moved"
                " elsewhere, by hooks on saved tensors for example. A layer with sharded experts"
                " doesn't take that with fullgraph=True: compile it without."
            )
        return one.back


def _through_graph(y: Tensor, inputs: Sequence[Tensor]) -> Back:
    """Goes back through what autograd recorded from ``inputs`` to ``y``, and keeps neither."""
    output, edges = get_gradient_edge(y), [get_gradient_edge(t) for t in inputs]

    def back(grad: Tensor) -> Sequence[Tensor | None]:
        with _recording(True):
            return torch.autograd.grad(
                [output], edges, [grad], retain_graph=True, allow_unused=True
            )

    return back


class _Enter(torch.autograd.Function):
    """Gives tensors an edge in autograd's graph that doesn't keep them alive, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(grads))


@contextmanager
def _recording(enabled: bool) -> Iterator[None]:
    """Records a graph where operators are called, which is below autograd."""
    if not enabled:
        with torch.no_grad():
            yield
        return
    below = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        below = below - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, below), torch.enable_grad():
        yield


@operator(f"{NAMESPACE}::routed_experts", tags=_TAGS)
def routed_experts(
    handle: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    expert_ids: Tensor,
    dispatched: Tensor | None,
    num_experts: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the schedule of a layer; not its shared expert.

    Args:
        handle: of the layer's :class:`Reference`.
        x: (T, D), in the dtype of the stacks.
        weights: (T, K).
        up: the stacks of this rank's experts, as
            :class:`~lightning_fastmoe.nn.experts.StackedExperts` has them.
        down: see there.
        up_bias: see there.
        down_bias: see there.
        expert_ids: (T, K) int64.
        dispatched: (T, K) bool, the slots that reach an expert; None for all.
        num_experts: E.
        wanted: which of x, weights and the stacks, None or not, a backward pass may ask for the
            gradients of.

    Returns:
        The output (T, D); (E,) int64, this rank's pairs of each expert, of those that reach it; and
        what stands for the pass, (1,) int64 on the CPU.
    """
    layer = Reference.layer(handle)
    tensors = [x, weights, up, down, up_bias, down_bias]
    by_hand = _run_by_hand(layer, tensors, expert_ids, dispatched, wanted)
    y, counts, back = by_hand or _run(layer, tensors, expert_ids, dispatched, num_experts, wanted)
    token = _scalar(0).reshape(1) if back is None else _Pass.keep(back)
    return y.detach().contiguous(), counts, token


def _run_by_hand(
    layer: Any,
    tensors: list[Tensor | None],
    expert_ids: Tensor,
    dispatched: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Back | None] | None:
    """The pass without autograd; None if the schedule has none, or the experts want one."""
    activation = layer.experts.activation
    if activation is None or has_hooks(layer.experts):
        return None
    with torch.no_grad():
        own, *rest = (None if t is None else t.detach() for t in tensors)
        assert own is not None
        given = own.contiguous(), *rest
        return layer.schedule.run_by_hand(  # type: ignore[no-any-return]
            given, expert_ids, dispatched, activation, layer.layer_name, wanted
        )


def _run(
    layer: Any,
    tensors: list[Tensor | None],
    expert_ids: Tensor,
    dispatched: Tensor | None,
    num_experts: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Back | None]:
    """The pass, recorded by autograd."""
    with _recording(any(wanted)):
        tensors = [None if t is None else t.detach() for t in tensors]
        entered = [t for t, needed in zip(tensors, wanted, strict=True) if needed and t is not None]
        if entered:
            root = torch.zeros((), device="cpu", requires_grad=True)
            entered = list(_Enter.apply(root, *entered))
            found = iter(entered)
            tensors = [
                next(found) if needed else t for t, needed in zip(tensors, wanted, strict=True)
            ]
        own, wide, *stacks = tensors
        assert own is not None
        assert wide is not None
        # No router's logits are needed here; what stands for them says how many experts there are.
        logits = wide.detach().new_empty(0, num_experts)
        routing = Routing(logits, logits, wide, expert_ids, active=dispatched)
        inputs = TokenInputs([own.contiguous()], None, tuple(own.shape[:-1]))
        experts = layer.experts.with_stacks([t for t in stacks if t is not None])
        y, routing = layer.schedule.run_routed(inputs, routing, experts, layer.layer_name)
        return y, routing.routed_counts(), _through_graph(y, entered) if entered else None


@operator(f"{NAMESPACE}::routed_experts_backward", tags=_TAGS)
def routed_experts_backward(grad: Tensor, token: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of those tensors of :func:`routed_experts` that were wanted.

    Args:
        grad: (T, D).
        token: of the pass.
        like: these tensors, or others of their shapes and dtypes.
    """
    # Compilers may have merged two calls with the same input: this operator goes back for both.
    found = _Pass.back_of(token)(grad.contiguous())
    return [
        torch.zeros_like(t, memory_format=torch.contiguous_format)
        if g is None
        else g.to(t.dtype).contiguous()
        for g, t in zip(found, like, strict=True)
    ]


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


@fake_of(routed_experts)
def _(handle: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    counts = x.new_empty(rest[-2], dtype=torch.int64)
    return _empty_like(x), counts, torch.empty(1, dtype=torch.int64, device="cpu")


@fake_of(routed_experts_backward)
def _(grad: Tensor, token: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [_empty_like(t) for t in like]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, counts, token = output
    ctx.wanted = inputs[-1]
    # Weights and stacks are what schedules keep, too; a compiler must not give their memory away.
    # That of x it may: its gradient looks like the output's.
    ctx.save_for_backward(token, *(t for t in inputs[2:7] if t is not None))
    ctx.is_given = [t is not None for t in inputs[2:7]]
    ctx.mark_non_differentiable(counts, token)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    token, *saved = ctx.saved_tensors
    others = iter(saved)
    tensors = [grad, *(next(others) if given else None for given in ctx.is_given)]
    like = [t for t, needed in zip(tensors, ctx.wanted, strict=True) if needed]
    found = iter(routed_experts_backward(grad, token, like))
    return None, *(next(found) if needed else None for needed in ctx.wanted), *(None,) * 4


differentiate(routed_experts, _backward, setup_context=_save)


@torch.library.custom_op(f"{NAMESPACE}::observe", mutates_args=("observed",), tags=ON_HOST)
def observe(
    observed: Tensor,
    handle: Tensor,
    logits: Tensor,
    scores: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    active: Tensor | None,
    kept: Tensor | None,
    tokens_per_expert: Tensor | None,
) -> None:
    """Shows a layer's observers the routing, unless a backward pass is replaying a forward pass.

    Args:
        observed: of the layer's :class:`Reference`; counts the passes.
        handle: of it, too.
        logits: as in :class:`~lightning_fastmoe.nn.Routing`, and so are the others.
        scores: see there.
        weights: see there.
        expert_ids: see there.
        active: see there.
        kept: see there.
        tokens_per_expert: see there.
    """
    if is_recomputing():
        return
    observed += 1
    routing = Routing(
        *(logits, scores, weights, expert_ids, active, kept), tokens_per_expert=tokens_per_expert
    )
    show_observers(Reference.layer(handle), routing)


@observe.register_fake
def _(observed: Tensor, *_: Any) -> None:
    pass
