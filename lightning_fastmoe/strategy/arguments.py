"""Checks the arguments of FastMoEStrategy: names, types, ranges and combinations."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning.strategies import DeepSpeedStrategy

from lightning_fastmoe.argument_types import check_known, check_types, parameters
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.strategy.watchdog.watch import check_seconds
from lightning_fastmoe.zero.config import check_stage

OWNER = "FastMoEStrategy"
DEFAULT_STAGE = 2
_POLICIES = ("raise", "skip", "ignore")
_REFUSED = {
    "load_full_weights": "a single file of weights loads without it: pass it as ckpt_path",
    "remote_device": "parameters are created on the rank's own device, then partitioned;"
    " offload_parameters=True moves them to the host",
}


def check_arguments(
    init: Callable[..., Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks our arguments, and refuses those of DeepSpeedStrategy that would have no effect.

    Args:
        init: FastMoEStrategy's, for the types of its own arguments.
        given: its ``locals()``, where "kwargs" are passed on to DeepSpeedStrategy.

    Returns:
        our own arguments and DeepSpeedStrategy's, with NumPy numbers converted to Python's.

    Raises:
        ConfigError: if one is unknown, has the wrong type, is out of range or has no effect.
    """
    base, others = DeepSpeedStrategy.__init__, given["kwargs"]
    own = {name: given[name] for name in parameters(init)}
    check_known(OWNER, others, [*parameters(init), *parameters(base)])
    size, stage, policy = own["expert_parallel_size"], own["stage"], own["nonfinite"]
    if type(size) is str and size != "auto" or type(size) in (bool, float) or size is None:
        raise _wrong_size(size)
    if type(stage) is str or type(stage) is bool or stage is None:
        raise ConfigError(
            f"{OWNER}: stage={stage!r} ({type(stage).__name__}) is invalid: it must be the integer"
            f" 1, 2 or 3, as in stage={DEFAULT_STAGE}."
        )
    if policy not in _POLICIES:
        raise ConfigError(
            f"{OWNER}: nonfinite={policy!r} is unknown. It must be one of: {', '.join(_POLICIES)}."
        )
    for name in ("hang_timeout", "signal_grace"):
        check_seconds(name, own[name])
    if own["exchange_timeout"] != "auto":
        check_seconds("exchange_timeout", own["exchange_timeout"])
    checked = check_types(OWNER, init, own)
    if checked["expert_parallel_size"] != "auto" and checked["expert_parallel_size"] < 1:
        raise _wrong_size(size)
    if checked["tokens_per_rank"] is not None and checked["tokens_per_rank"] < 1:
        raise ConfigError(
            f"{OWNER}: tokens_per_rank={checked['tokens_per_rank']} must be at least 1, or None."
        )
    check_stage(checked["stage"])
    names = {k: v for k, v in others.items() if k != "logging_level" or not _is_level(v)}
    passed_on = {**others, **check_types(OWNER, base, names, whole_floats=True)}
    for name, reason in _REFUSED.items():
        if others.get(name):
            raise ConfigError(f"{name}={others[name]!r} is refused: {reason}. Drop the argument.")
    if not passed_on.get("zero_optimization", True):
        raise ConfigError(
            "zero_optimization=False is refused: experts are trained by ZeRO stage 1, 2 or 3. Drop"
            " the argument."
        )
    if others.get("config") is not None:
        _check_beside_config(others)
    return checked, passed_on


def check_stage_beside_config(stage: int, config: Mapping[str, Any]) -> None:
    """Refuses a stage that the DeepSpeed config overrides.

    Raises:
        ConfigError: naming both.
    """
    configured = config["zero_optimization"]["stage"]
    if stage not in (DEFAULT_STAGE, configured):
        raise ConfigError(
            f"{OWNER}: stage={stage} has no effect, as the DeepSpeed config sets"
            f" zero_optimization.stage to {configured}. Give one of the two."
        )


def _wrong_size(size: Any) -> ConfigError:
    return ConfigError(
        f"{OWNER}: expert_parallel_size={size!r} is invalid: it must be 'auto' or an integer of at"
        " least 1."
    )


def _is_level(value: Any) -> bool:
    return isinstance(value, str) and value in logging.getLevelNamesMapping()


def _check_beside_config(others: Mapping[str, Any]) -> None:
    """Refuses arguments that DeepSpeedStrategy ignores when it is given a config."""
    into_config = parameters(DeepSpeedStrategy._create_default_config)
    usual = inspect.signature(DeepSpeedStrategy.__init__).parameters
    for name, value in others.items():
        if name in into_config and value != usual[name].default:
            raise ConfigError(
                f"{OWNER}: {name}={value!r} has no effect with config=, which replaces all"
                " arguments that DeepSpeed's config covers. Set it in the config, or drop config=."
            )
