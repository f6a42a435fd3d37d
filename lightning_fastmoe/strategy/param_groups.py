"""Optimizer groups: DeepSpeed wants experts apart, users and schedulers want theirs as written.

The user's optimizer goes to DeepSpeed with every group split into a dense part and an expert part.
Schedulers, and monitors through them, keep working on a stand-in that has the groups as the user
wrote them; what they write there (learning rate, momentum, ...) is pushed to the split groups
before each step. So any scheduler works, whatever it keeps per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fastmoe.checkpoint.optimizer_state import (
    NamedGroup,
    by_parameter,
    common,
    options_of,
    restored,
)
from lightning_fastmoe.errors import ConfigError, ParameterGroupError
from lightning_fastmoe.strategy.experts import is_tagged


class UserParamGroups(Optimizer):
    """Stands where a scheduler expects the optimizer; holds the groups as the user wrote them.

    It never steps. It compares equal to the optimizer that it stands for, so that tools which list
    optimizers and schedulers' optimizers (LearningRateMonitor) see one, not two.
    """

    def __new__(
        cls, optimizer: Optimizer, names: Mapping[int, str] | None = None
    ) -> UserParamGroups:
        """An instance of a subclass named like the optimizer's: monitors show the class name."""
        return object.__new__(type(type(optimizer).__name__, (cls,), {}))

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str] | None = None) -> None:
        self._names = names or {}
        # Not super().__init__(): that would add hooks and validate groups a second time.
        self._real = optimizer
        self.defaults = optimizer.defaults
        self.param_groups = [dict(group) for group in optimizer.param_groups]
        self._sources: list[int] = []
        self._pushed: list[dict[str, Any]] = []
        # Schedulers warn when they step before an optimizer that they watch; DeepSpeed's engine
        # steps, not this object.
        self._opt_called = True

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The real optimizer's state."""
        return self._real.state

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._real

    def __hash__(self) -> int:
        return id(self._real)

    def __repr__(self) -> str:
        return f"UserParamGroups of {self._real!r}"

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Never called: the engine steps.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "optimizer.step() was called on the parameter groups that schedulers see. Under"
            " FastMoEStrategy the engine steps; call it through self.optimizers() instead."
        )

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def split_from(self, sources: list[int]) -> None:
        """Notes that the real optimizer's group j was split from our group ``sources[j]``."""
        self._sources = sources
        self._pushed = [self._hyperparameters(i) for i in sources]

    def push(self) -> None:
        """Writes what changed here since the last push into the real optimizer's groups.

        What did not change here is left alone, so a value that the user set on
        ``trainer.optimizers`` directly stands.
        """
        for j, source in enumerate(self._sources):
            now, before = self._hyperparameters(source), self._pushed[j]
            for key, value in now.items():
                if key not in before or not _equal(before[key], value):
                    self._real.param_groups[j][key] = value
            self._pushed[j] = now

    def named(self) -> list[NamedGroup]:
        """The groups by the names of their parameters, for a checkpoint."""
        return [
            NamedGroup([self._names[id(p)] for p in group["params"]], options_of(group))
            for group in self.param_groups
        ]

    def load_named(self, rows: list[dict[str, Any]], where: object) -> None:
        """Restores :meth:`named`; the real optimizer has restored its own.

        Raises:
            CheckpointError: if parameters that are in one group here had different options.
        """
        saved = by_parameter(rows, "options")
        for group, own in zip(self.param_groups, self.named(), strict=True):
            options = common(own.params, saved, "the optimizer options", where) or {}
            group.update({k: restored(v, group.get(k)) for k, v in options.items()})
        self._pushed = [self._hyperparameters(i) for i in self._sources]

    @property
    def has_experts(self) -> bool:
        """Whether some of the real optimizer's groups hold spread experts."""
        return any(group.get("moe") for group in self._real.param_groups)

    def _hyperparameters(self, index: int) -> dict[str, Any]:
        # Schedulers write a learning rate that is a tensor in place, so a copy is compared.
        return options_of(self.param_groups[index])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def split_expert_groups(
    optimizer: Optimizer, names: Mapping[int, str], expert_group: str
) -> UserParamGroups:
    """Splits each group of ``optimizer`` in place into a dense and an expert group.

    Args:
        optimizer: fresh, as ``configure_optimizers`` returned it.
        names: ``id(parameter)`` -> name, of the whole model.
        expert_group: DeepSpeed's name of the expert data parallel group.

    Returns:
        The groups as they were, for schedulers.

    Raises:
        ParameterGroupError: if a parameter is in two groups, or is not part of the model, or if
            there is none to be trained.
    """
    _check_membership(optimizer, names)
    user = UserParamGroups(optimizer, names)
    groups: list[dict[str, Any]] = []
    sources: list[int] = []
    for i, group in enumerate(optimizer.param_groups):
        parameters = group["params"]
        dense = [p for p in parameters if not is_tagged(p)]
        experts = [p for p in parameters if is_tagged(p)]
        label = group.get("name", f"group_{i}")
        # DeepSpeed drops frozen parameters, and fails on a group that is left with none.
        if any(p.requires_grad for p in dense):
            groups.append({**group, "params": dense, "name": label})
            sources.append(i)
        if any(p.requires_grad for p in experts):
            groups.append({**group, "params": experts, "name": expert_group, "moe": True})
            sources.append(i)
    if not groups:
        raise ParameterGroupError(
            f"The {type(optimizer).__name__} holds no parameter that is to be trained: it is empty,"
            " or all are frozen. Return an optimizer of self.parameters() from"
            " configure_optimizers(), and set requires_grad=True on what should be trained."
        )
    optimizer.param_groups[:] = groups
    user.split_from(sources)
    return user


def name_groups_apart(optimizer: Optimizer) -> None:
    """Gives expert groups unique names, once DeepSpeed has looked their process group up.

    Several share DeepSpeed's name, and LearningRateMonitor refuses duplicates.
    """
    for i, group in enumerate(optimizer.param_groups):
        if group.get("moe"):
            group["name"] = f"experts_{i}"


def rebind_scheduler(scheduler: Any, optimizer: Optimizer, stand_in: Optimizer) -> None:
    """Points a scheduler at the stand-in, and those inside it, however it holds them."""
    for key, value in list(vars(scheduler).items()):
        if value is optimizer:
            setattr(scheduler, key, stand_in)
            continue
        parts = value.values() if isinstance(value, dict) else value
        for part in parts if isinstance(value, dict | list | tuple) else [value]:
            if isinstance(part, LRScheduler) or getattr(part, "optimizer", None) is optimizer:
                rebind_scheduler(part, optimizer, stand_in)


def _check_membership(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _check_parameter(parameter, names, seen)
            seen.add(id(parameter))


def _check_parameter(parameter: nn.Parameter, names: Mapping[int, str], seen: set[int]) -> None:
    if id(parameter) in seen:
        raise ParameterGroupError(
            f"Parameter {names.get(id(parameter), '?')!r} is in two groups of the optimizer, so it"
            " would be updated twice. Put it into one."
        )
    if id(parameter) not in names:
        raise ParameterGroupError(
            f"The optimizer holds a parameter of shape {tuple(parameter.shape)} that is not part"
            " of the model. Create the optimizer in configure_optimizers() from self.parameters():"
            " before, the experts were not spread yet."
        )
