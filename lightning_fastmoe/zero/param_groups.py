"""Splits experts into optimizer groups for DeepSpeed, and hides that from the user.

The Trainer, schedulers and monitors keep the object that ``configure_optimizers`` returned, with
its groups in order. DeepSpeed gets a twin of it, whose groups are each split into a dense part and
an expert part. The options of the user's groups are copied to the twin's right before each step, so
there is one place to read and set a value.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fastmoe.checkpoint.param_options import (
    NamedGroup,
    by_parameter,
    common,
    options_of,
    restored,
    same,
)
from lightning_fastmoe.errors import ConfigError, ParameterGroupError
from lightning_fastmoe.zero.groups import is_tagged
from lightning_fastmoe.zero.shared_options import SharedOptions

_OWN_KEYS = frozenset({"params", "name", "moe"})
"""Keys of a group that the twin doesn't share with the user's optimizer."""
_MISSING = object()
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class EngineOptimizer(Optimizer):
    """Mixin for the user's optimizer while an engine steps for it.

    The parameters' gradients and master weights belong to ZeRO, so methods that act on them go
    through ZeRO, or raise.
    """

    _fastmoe_class: type[Optimizer]
    _fastmoe_zero_grad: Callable[[bool], None]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Never called: the engine steps.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "optimizer.step() was called on the optimizer that configure_optimizers returned. Under"
            " FastMoEStrategy the engine steps; call self.optimizers().step() instead."
        )

    # Keeps schedulers from warning that the optimizer was not stepped, or its step() replaced.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    _opt_called = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of a step in progress, wherever ZeRO keeps them."""
        self._fastmoe_zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises: ZeRO has partitioned the groups.

        Raises:
            ParameterGroupError: always.
        """
        raise ParameterGroupError(_FIXED_GROUPS.format("add_param_group() was called"))

    def state_dict(self) -> dict[str, Any]:
        """Refused: each rank has a part of the state.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "optimizer.state_dict() is not available: the optimizer's state is partitioned over"
            " ranks. Save it with Trainer.save_checkpoint()."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused: each rank has a part of the state.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "optimizer.load_state_dict() is not available: the optimizer's state is partitioned"
            " over ranks. Resume with Trainer.fit(ckpt_path=...)."
        )


_FIXED_GROUPS = (
    "{} after training was set up, when ZeRO had partitioned the optimizer's groups. Give the"
    " optimizer all parameters in configure_optimizers(); a group with lr=0 and weight_decay=0"
    " doesn't change until you set its lr."
)


class UserParamGroups:
    """The groups of the user's optimizer, and the twin optimizer with experts split off.

    Args:
        optimizer: the user's optimizer.
        names: ``id(parameter)`` -> name, of the whole model.
        twin: the optimizer that steps in its place.
        sources: the twin's group j was split from the user's group ``sources[j]``.

    Attributes:
        twin: the optimizer that steps in place of the user's.
        shared: compares options over ranks; None for a single one.
    """

    shared: SharedOptions | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        twin: Optimizer,
        sources: list[int],
    ) -> None:
        self.optimizer, self.twin = optimizer, twin
        self._names, self._sources = names, sources
        self._steppers = [twin]
        self._members = self._parameter_ids()
        self._seen = [_options(group) for group in optimizer.param_groups]

    def attach(self, zero: Any) -> None:
        """Connects the user's optimizer to ZeRO's, which the engine has built.

        Args:
            zero: DeepSpeed's optimizer around the twin.
        """
        optimizer, kind = self.optimizer, type(self.optimizer)
        # DeepSpeed steps this one for partitions that "offload_optimizer.ratio" leaves on the GPU.
        backup = getattr(zero, "backup_optimizer", None)
        self._steppers = [self.twin] if backup is None else [self.twin, backup]
        vars(optimizer).pop("step", None)  # a scheduler's wrapper around the class's step
        vars(optimizer).pop("_opt_called", None)
        optimizer._fastmoe_class = kind  # type: ignore[attr-defined]
        drop = getattr(zero, "drop_gradients", zero.zero_grad)
        optimizer._fastmoe_zero_grad = drop  # type: ignore[attr-defined]
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        optimizer.__class__ = type(kind.__name__, (EngineOptimizer, kind), names)

    def push(self) -> None:
        """Copies changes of the user's groups since the last call to the twin's.

        Raises:
            ParameterGroupError: if groups or parameters were added, removed or moved.
        """
        if self._parameter_ids() != self._members:
            raise ParameterGroupError(_FIXED_GROUPS.format("optimizer.param_groups has changed"))
        options = [_options(group) for group in self.optimizer.param_groups]
        for j, source in enumerate(self._sources):
            now, before = options[source], self._seen[source]
            changed = {k: v for k, v in now.items() if not _equal(before.get(k, _MISSING), v)}
            for stepper in self._steppers:
                group = stepper.param_groups[j]
                group.update(changed)
                for key in before.keys() - now.keys():
                    group.pop(key, None)
        self._seen = options

    def pull(self) -> None:
        """Copies what the twin's step wrote to its groups back to the user's.

        Some optimizers keep counters there. A value that differs between the dense and the expert
        part of a group can't be shown in the user's group, and is not copied.
        """
        for source, group in enumerate(self.optimizer.param_groups):
            parts = [
                _options(self.twin.param_groups[j])
                for j, part_of in enumerate(self._sources)
                if part_of == source
            ]
            for key, value in (parts[0] if parts else {}).items():
                is_ours = not key.startswith("_") and not _equal(group.get(key, _MISSING), value)
                if is_ours and all(_equal(part.get(key, _MISSING), value) for part in parts):
                    group[key] = self._seen[source][key] = value

    def call_hooks(self, *, after: bool) -> None:
        """Calls what the user has registered to be called before or after each step.

        The twin has none: its step is called for each of its groups, has ZeRO's fragments of
        parameters, and ZeRO overwrites the weights after it.

        Args:
            after: whether the step has been taken.
        """
        for hook in tuple(vars(self.optimizer)[_HOOKS[after]].values()):
            hook(self.optimizer, (self.optimizer,), {})

    def named(self) -> list[NamedGroup]:
        """The groups by the names of their parameters, for a checkpoint."""
        return [
            NamedGroup([self._names[id(p)] for p in group["params"]], options_of(group))
            for group in self.optimizer.param_groups
        ]

    def load_named(self, rows: list[dict[str, Any]], where: object) -> None:
        """Restores what :meth:`named` saved, after the options of the twin's groups are restored.

        Where the two differ, the saved run trained with the twin's.

        Raises:
            CheckpointError: if parameters that are in one group here had different options.
        """
        saved = by_parameter(rows, "options")
        for group, own in zip(self.optimizer.param_groups, self.named(), strict=True):
            options = common(own.params, saved, "the optimizer options", where) or {}
            group.update({k: restored(v, group.get(k)) for k, v in options.items()})
        self._seen = [_options(group) for group in self.optimizer.param_groups]
        for j, source in enumerate(self._sources):
            for key, value in self._seen[source].items():
                for stepper in self._steppers:
                    group = stepper.param_groups[j]
                    if key in group and same(group[key], value):
                        group[key] = value  # one tensor, which a scheduler changes in place
        self.pull()

    @property
    def has_experts(self) -> bool:
        """Whether some of the twin's groups hold sharded experts."""
        return any(group.get("moe") for group in self.twin.param_groups)

    def _parameter_ids(self) -> list[list[int]]:
        return [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _OWN_KEYS}


def _equal(a: Any, b: Any) -> bool:
    """Whether a value is unchanged. Tensors are shared, so only a different object is a change."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # containers of tensors
        return False


def split_expert_groups(
    optimizer: Optimizer, names: Mapping[int, str], expert_group: str
) -> UserParamGroups:
    """Splits each group of ``optimizer`` into a dense and an expert group of a twin.

    Args:
        optimizer: the optimizer that ``configure_optimizers`` returned, before its first step.
        names: ``id(parameter)`` -> name, of the whole model.
        expert_group: DeepSpeed's name for the expert data parallel group.

    Returns:
        Both optimizers, to be attached to the engine once it exists.

    Raises:
        ConfigError: if the optimizer steps through another one.
        ParameterGroupError: if a parameter is in two groups or not part of the model, or if no
            parameter is trainable.
    """
    _check_membership(optimizer, names)
    groups: list[dict[str, Any]] = []
    sources: list[int] = []
    for i, group in enumerate(optimizer.param_groups):
        parameters = group["params"]
        dense = [p for p in parameters if not is_tagged(p)]
        experts = [p for p in parameters if is_tagged(p)]
        options = _options(group)
        # DeepSpeed drops frozen parameters, and fails on a group that becomes empty.
        if any(p.requires_grad for p in dense):
            groups.append({**options, "params": dense, "name": f"group_{i}"})
            sources.append(i)
        if any(p.requires_grad for p in experts):
            groups.append({**options, "params": experts, "name": expert_group, "moe": True})
            sources.append(i)
    if not groups:
        kind = type(optimizer).__name__
        if kind == "_MockOptimizer":  # Lightning's
            raise ParameterGroupError("configure_optimizers() returned None: return an optimizer.")
        raise ParameterGroupError(
            f"The {kind} holds no trainable parameter: it is empty,"
            " or all are frozen. Return an optimizer of self.parameters() from"
            " configure_optimizers(), and set requires_grad=True on what should be trained."
        )
    return UserParamGroups(optimizer, names, _twin(optimizer, groups), sources)


def release(optimizer: Optimizer) -> None:
    """Restores the class of an optimizer that an earlier fit used."""
    if isinstance(optimizer, EngineOptimizer):
        optimizer.__class__ = optimizer._fastmoe_class  # type: ignore[assignment]
        for name in ("step", "_fastmoe_class", "_fastmoe_zero_grad"):
            vars(optimizer).pop(name, None)


def _twin(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """A copy of the user's optimizer, with its state but not its hooks, on other groups.

    Raises:
        ConfigError: if it steps through another optimizer, or step() was replaced on the object.
    """
    kind = type(optimizer).__name__
    twin: Optimizer = object.__new__(type(optimizer))
    for key, value in vars(optimizer).items():  # copy.copy drops attributes of subclasses
        if isinstance(value, Optimizer):
            raise ConfigError(
                f"{kind} steps through another optimizer, its attribute {key!r}, whose groups"
                " DeepSpeed would not see. Return an optimizer that updates parameters itself."
            )
        if key == "step" and not hasattr(value, "_wrapped_by_lr_sched"):
            raise ConfigError(
                f"step() was replaced on the {kind} object, and the engine would not call it."
                " Override it in a subclass."
            )
        if key not in ("step", "param_groups"):
            setattr(twin, key, OrderedDict() if key in _HOOKS else value)
    twin.param_groups = groups
    # Keeps it alive: some optimizers own native memory that is freed with the original object.
    twin._fastmoe_origin = optimizer  # type: ignore[attr-defined]
    return twin


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
            " earlier, the experts are not sharded yet."
        )
