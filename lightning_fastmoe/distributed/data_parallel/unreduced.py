"""Notices an optimizer step by gradients that are each rank's own, still or again.

Such a step moves the replicas of a weight apart, without any error ever after: losses only get a
little worse. So parameters note when a backward pass adds to their gradient, one call for each, and
optimizers ask before and after each step.

Gradients that were changed after they had been averaged, such as by torch's ``clip_grad_norm_``,
may be identical on all ranks or not. So there each rank remembers their norm, which goes with what
the ranks exchange before the next step; and so does the number of steps, which a rank may skip.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_fastmoe.distributed.data_parallel.contents import Item
from lightning_fastmoe.errors import ConfigError

_watches: weakref.WeakKeyDictionary[nn.Module, weakref.ref[UnreducedGradients]]
_watches = weakref.WeakKeyDictionary()
"""The watch over each model, which its wrapper keeps: of several wrappers, the last one's."""


class UnreducedGradients:
    """Which gradients of a model have not been averaged over ranks since something was added.

    It refuses steps of any ``torch.optim.Optimizer``; an update by hand goes unnoticed.

    Args:
        model: whose parameters they are.
        items: those to watch; without any, every step is allowed.
    """

    def __init__(self, model: nn.Module, items: Sequence[Item]) -> None:
        earlier = _watches.pop(model, None)
        if earlier is not None and (watch := earlier()) is not None:
            watch.end()
        self._items = {id(item.tensor): item for item in items}
        self._noting: set[int] = set()
        self._pending: set[int] = set()
        self._versions: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._changes: list[Tensor] = []
        self._steps = 0
        self._handles: list[Any] = []
        self._end = weakref.finalize(self, _remove, self._handles)
        if not items:
            return
        self._note_trained()
        # These hooks live as long as the process: they must not keep the model.
        this = weakref.ref(self)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def ask(optimizer: Optimizer, *_: Any) -> None:
            if (watch := this()) is not None:
                watch.check(optimizer)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def begin(optimizer: Optimizer, *_: Any) -> None:
            if (watch := this()) is not None:
                watch.check(optimizer)
                watch.note_changes(optimizer)
                watch.note_step(optimizer)

        self._handles += [
            register_optimizer_step_pre_hook(begin),
            register_optimizer_step_post_hook(ask),  # a closure may have run backward passes
            model.register_forward_pre_hook(_refuse_ddp),
        ]
        _watches[model] = this

    def _note_trained(self) -> None:
        """Looks at parameters that were frozen before, too."""
        pending = self._pending

        def note(parameter: Tensor) -> None:
            pending.add(id(parameter))

        for key, item in self._items.items():
            if item.tensor.requires_grad and key not in self._noting:
                self._noting.add(key)
                self._handles.append(item.tensor.register_post_accumulate_grad_hook(note))

    def check(self, optimizer: Optimizer) -> None:
        """Refuses a step by gradients that are this rank's own.

        Raises:
            ConfigError: naming the parameter.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                key = id(parameter)
                own = key in self._pending or (key in self._items and key not in self._noting)
                if own and parameter.grad is not None:
                    raise ConfigError(
                        f"{type(optimizer).__name__}.step(): the gradient of"
                        f" {self._items[key].name} is this rank's own, so the ranks' weights"
                        " would drift apart. Call reduce_gradients() of ExpertDataParallel first,"
                        " once for each step, after all of its backward passes."
                    )

    @torch.no_grad()
    def note_changes(self, optimizer: Optimizer) -> None:
        """Remembers the norm of the optimizer's dense gradients that are not as they were reduced.

        Without a wait for the device.
        """
        changed = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                item, grad = self._items.get(id(parameter)), parameter.grad
                if item is None or item.is_expert or not isinstance(grad, Tensor):
                    continue
                known = self._versions.get(id(parameter))
                if known is None or known[0]() is not grad or known[1] != grad._version:
                    changed.append(grad)
        if changed:
            kinds = [torch.promote_types(grad.dtype, torch.float32) for grad in changed]
            norms = [
                torch.linalg.vector_norm(grad, dtype=kind).float()
                for grad, kind in zip(changed, kinds, strict=True)
            ]
            self._changes.append(torch.stack(norms).sum())

    def note_step(self, optimizer: Optimizer) -> None:
        """Counts a step of the parameters that are watched."""
        groups = optimizer.param_groups
        self._steps += any(id(p) in self._items for group in groups for p in group["params"])

    def take_found(self) -> tuple[Tensor | None, int]:
        """Since the last call: what :meth:`note_changes` remembers, if anything; and the steps."""
        changes, steps = self._changes, self._steps
        self._changes, self._steps = [], 0
        return torch.stack(changes).sum() if changes else None, steps

    def reduced(self) -> None:
        """All gradients are those of all ranks now."""
        self._note_trained()
        self._pending.clear()
        self.remember_versions()

    def remember_versions(self) -> None:
        """Gradients are identical on all ranks that have them: what differs later was changed."""
        self._versions = {
            key: (weakref.ref(grad), grad._version)
            for key, item in self._items.items()
            if (grad := item.tensor.grad) is not None
        }

    def end(self) -> None:
        """Stops watching."""
        self._end()


def _refuse_ddp(*_: Any) -> None:
    if DistributedDataParallel._active_ddp_module is not None:
        raise ConfigError(
            "The model of ExpertDataParallel runs inside DistributedDataParallel, which has given"
            " all ranks rank 0's experts and would average the gradients of different ones. Use"
            " the model itself: reduce_gradients() averages what ranks share."
        )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
