"""Registers the strategy's names with Lightning's Trainer, without importing Lightning.

``import lightning_fastmoe`` must be cheap, and ``Trainer(strategy="fastmoe")`` must work after it.
So the names are registered when ``pytorch_lightning.strategies`` is imported, whether before or
after this package, and the strategy itself is imported when a Trainer asks for it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from lightning_fastmoe.errors import ConfigError, ForeignObjectError

NAME = "fastmoe"
VARIANTS: dict[str, dict[str, Any]] = {
    NAME: {},
    f"{NAME}_stage_1": {"stage": 1},
    f"{NAME}_stage_2": {"stage": 2},
    f"{NAME}_stage_3": {"stage": 3},
    f"{NAME}_stage_2_offload": {"stage": 2, "offload_optimizer": True},
    f"{NAME}_stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    f"{NAME}_offload": {},
    f"{NAME}_offload_ddp": {},
}
"""The strategy's arguments by the name given to ``Trainer(strategy=...)``."""

CLASSES = {
    f"{NAME}_offload": "OffloadStrategy",
    f"{NAME}_offload_ddp": "OffloadDDPStrategy",
}
"""The class of each name; of the others, FastMoEStrategy."""

OURS = "pytorch_lightning.strategies"
FOREIGN = "lightning.pytorch.strategies"
_FIX = (
    "Import from pytorch_lightning instead (import pytorch_lightning as pl), and from"
    " lightning_fabric instead of lightning.fabric, in the whole program."
)


class ForeignPackageWarning(UserWarning):
    """The package ``lightning`` is imported, whose classes differ from ``pytorch_lightning``'s."""


def register_names(registry: Any, make_strategy: Callable[..., Any]) -> None:
    """Adds :data:`VARIANTS` to one of Lightning's strategy registries.

    Args:
        registry: ``pytorch_lightning.strategies.StrategyRegistry``, or one like it.
        make_strategy: called with the name of a class of this package and a variant's arguments
            when a Trainer asks for it.
    """
    for name, arguments in VARIANTS.items():
        if name not in registry:
            kind = CLASSES.get(name, "FastMoEStrategy")
            make = partial(make_strategy, kind)
            registry.register(name, make, description=f"{kind}: {arguments}", **arguments)


def register_with_lightning(make_strategy: Callable[..., Any]) -> None:
    """Registers the names when Lightning is imported; immediately if it already is.

    Args:
        make_strategy: as in :func:`register_names`.
    """

    def ours(module: ModuleType) -> None:
        register_names(module.StrategyRegistry, make_strategy)
        _explain_unknown_names(module.StrategyRegistry)

    when_imported({OURS: ours, FOREIGN: _warn_about_foreign})


class _Names(list[str]):
    """The names in a registry, in which the Trainer looks up its ``strategy``."""

    def __contains__(self, name: object) -> bool:
        known = super().__contains__(name)
        if not known and isinstance(name, str) and name.startswith(NAME):
            # Lightning's own message doesn't list this package's names.
            raise ConfigError(
                f"strategy={name!r} is unknown. The names of this package's strategies are:"
                f" {', '.join(VARIANTS)}. For other arguments give an object:"
                " strategy=FastMoEStrategy(...)."
            )
        return known


def _explain_unknown_names(registry: Any) -> None:
    names = registry.available_strategies
    registry.available_strategies = lambda: _Names(names())


def _warn_about_foreign(module: ModuleType) -> None:
    registry = getattr(module, "StrategyRegistry", None)
    if registry is not None:
        register_names(registry, _refuse_foreign)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            "lightning_fastmoe works with pytorch_lightning, but this program imports the package"
            " lightning, whose classes are different: its Trainer rejects FastMoEStrategy as an"
            f" invalid strategy name. {_FIX}",
            ForeignPackageWarning,
            stacklevel=2,
        )


def _refuse_foreign(_kind: str, **_: Any) -> NoReturn:
    raise ForeignObjectError(
        "FastMoEStrategy is a strategy of pytorch_lightning, but this Trainer is from"
        f" lightning.pytorch. The two packages can't be mixed. {_FIX}"
    )


def when_imported(calls: dict[str, Callable[[ModuleType], None]]) -> None:
    """Calls each function with the module of its name, once that is imported."""
    missing = {}
    for name, call in calls.items():
        if (module := sys.modules.get(name)) is not None:
            call(module)
        else:
            missing[name] = call
    if missing:
        sys.meta_path.insert(0, _Watcher(missing))


class _Watcher(MetaPathFinder):
    """Calls a function after a module has been imported; leaves finding it to other finders."""

    def __init__(self, calls: dict[str, Callable[[ModuleType], None]]) -> None:
        self._calls = calls

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        call = self._calls.pop(name, None)
        if call is None:
            return None
        spec = importlib.util.find_spec(name)  # by the other finders: popped here
        if spec is None or spec.loader is None:
            self._calls[name] = call
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            # A loader may be shared by all modules of an archive.
            if module.__name__ == name:
                vars(loader).pop("exec_module", None)
            try:
                run(module)
            except BaseException:
                self._calls[name] = call  # a later attempt may succeed
                raise
            if module.__name__ == name:
                call(module)

        loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec
