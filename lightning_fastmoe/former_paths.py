"""Keeps modules importable under the dotted paths that they had in earlier versions.

Configuration files, pickles and users' scripts refer to classes by their module, so a module that
has moved must still be importable under its old path. It is the same module object under both
names, so a class has one identity, however it was imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.partition(".")[0]
FORMER = {
    "callbacks.co_activation": "monitoring.callbacks.co_activation",
    "callbacks.expert_load": "monitoring.callbacks.expert_load",
    "callbacks.summary": "monitoring.callbacks.summary",
    "callbacks.throughput": "monitoring.callbacks.throughput",
    "checkpoint.huggingface": "huggingface",
    "co_activation_log": "monitoring.logs.co_activation",
    "lm.batch": "huggingface.batch",
    "lm.causal_lm": "huggingface.causal_lm",
    "lm.cli": "demos.byte_lm.cli",
    "lm.data": "demos.byte_lm.data",
    "lm.decoder": "huggingface.decoder",
    "lm.model": "demos.byte_lm.model",
    "lm.parser": "demos.byte_lm.parser",
    "lm.progress": "demos.byte_lm.progress",
    "lm.sampling": "demos.byte_lm.sampling",
    "load_log": "monitoring.logs.expert_load",
    "metrics.expert_load": "monitoring.metrics.expert_load",
    "metrics.formulas": "monitoring.metrics.formulas",
    "metrics.routing": "monitoring.metrics.routing",
    "nn.router.base": "nn.router.interface",
}
"""Former path -> path, both inside the package."""


def serve_former_paths() -> None:
    """Makes the paths in :data:`FORMER` importable; modules are imported on demand."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First in the list: a file left behind by an older installation would be another module.
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, former = name.partition(".")
        if package != _PACKAGE or former not in FORMER:
            return None
        return ModuleSpec(name, _Alias(f"{_PACKAGE}.{FORMER[former]}"))


class _Alias(Loader):
    def __init__(self, path: str) -> None:
        self._path = path

    def exec_module(self, module: ModuleType) -> None:
        # The import system looks the module up again afterwards, and finds the moved one.
        sys.modules[module.__name__] = import_module(self._path)
