"""torch.compile under the strategy: parameters and layers keep the names of the plain module.

``torch.compile(module)`` puts a wrapper around a module, and its ``_orig_mod.`` into every name
below. Here the module replaces its wrapper and is compiled as by ``module.compile()``, so that a
parameter has one name in checkpoints, metrics and errors. ``trainer.fit(torch.compile(m))`` works
likewise: the LightningModule is unwrapped, and its steps are compiled while the Trainer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.compile import to_uncompiled
from torch import nn
from torch._dynamo import OptimizedModule

from lightning_fastmoe.errors import ConfigError

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_LOGS = ("log", "log_dict")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unwrap_compiled(module: nn.Module) -> None:
    """Replaces every torch.compile wrapper inside ``module`` by the module that it wraps.

    The module stays compiled, with the wrapper's back end and options.

    Raises:
        ConfigError: if a wrapper has hooks, which would be lost.
    """
    for prefix, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, OptimizedModule):
                path = f"{prefix}.{name}" if prefix else name
                parent._modules[name] = _compiled_in_place(child, path)


def _compiled_in_place(wrapper: OptimizedModule, path: str) -> nn.Module:
    inner: Any = wrapper
    while isinstance(inner, OptimizedModule):
        if any(vars(inner).get(hooks) for hooks in _HOOKS):
            raise ConfigError(
                f"A hook is registered on {path.replace('_orig_mod.', '')!r} after torch.compile"
                " wrapped it; the strategy removes the wrapper to keep its name out of"
                " checkpoints. Register the hook before torch.compile, or compile with"
                " module.compile()."
            )
        inner = inner._orig_mod
    inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)
    plain: nn.Module = inner
    return plain


class CompiledSteps:
    """The steps of a compiled LightningModule; one object per strategy.

    Lightning marks such a module, and refuses marked modules for unknown strategies. The mark is
    removed here, and the steps are compiled between :meth:`apply` and :meth:`undo`.

    Attributes:
        module: the LightningModule, or None.
    """

    def __init__(self) -> None:
        self.module: pl.LightningModule | None = None
        self._compile: Callable[..., Any] | None = None
        self._replaced: dict[str, Any] = {}

    def take(self, module: pl.LightningModule | None) -> None:
        """Removes the mark.

        Args:
            module: as ``pytorch_lightning.utilities.compile.from_compiled`` made it, if it was
                compiled. The same one may be given again, by then without its mark.
        """
        if module is not self.module:
            self.module, self._compile = module, None
        context = getattr(module, "_compiler_ctx", None)
        if module is None or context is None:
            return
        self._compile = context["dynamo_ctx"]
        to_uncompiled(module)
        for name in _STEPS:  # to_uncompiled leaves methods of the class on the instance
            if vars(module).get(name) == MethodType(getattr(type(module), name), module):
                del vars(module)[name]

    def apply(self) -> None:
        """Compiles the steps, if the module was compiled."""
        if self._compile is None:
            return
        # Lightning's log() inspects hooks in ways that dynamo fails at.
        self._replace(_LOGS, torch.compiler.disable)
        self._replace(_STEPS, self._compile)

    def _replace(self, names: Iterable[str], make: Callable[..., Any]) -> None:
        for name in names:
            self._replaced[name] = vars(self.module).get(name)
            vars(self.module)[name] = make(getattr(self.module, name))

    def undo(self) -> None:
        """Restores the module."""
        for name, before in self._replaced.items():
            vars(self.module).pop(name, None)
            if before is not None:
                vars(self.module)[name] = before
        self._replaced.clear()
