"""CapacitySchedule: changes capacity, top-k and noise during training."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE, moe_layers

Schedule = dict[int, float | None] | Callable[[int], float | None]
"""A dict from step to value, or a function of the step."""

NOISES = ("noise", "jitter")
"""The routers' attributes for noise: of noisy top-k and of Switch."""


class CapacitySchedule(pl.Callback):
    """Changes capacity factors, top-k and noise of MoE layers between steps, without rebuilding.

    Like Tutel's per-iteration capacity and top-k. A schedule is a dict from an optimizer step to
    the value from that step on::

        CapacitySchedule(capacity_factor={0: 2.0, 1000: 1.25})       # 2.0, then 1.25
        CapacitySchedule(top_k={0: 4, 5000: 2}, noise={0: 1.0, 2000: 0.0}, interpolation="linear")

    or a function from the step to the value. A value depends only on the step, so it is the same on
    all ranks and in resumed runs, and for all micro-batches of a step. Before the first step of a
    dict, and without a schedule, the layer keeps its setting. Evaluation uses
    ``eval_capacity_factor``.

    Args:
        capacity_factor: schedule for training; the value None is dropless.
        eval_capacity_factor: schedule for evaluation; the value None is dropless.
        top_k: experts per token, K; rounded to integers by linear interpolation.
        noise: the factor on the noise of noisy top-k routers, and the jitter of Switch routers.
        interpolation: "step" or "linear", between consecutive numbers of a dict. Values are held
            before a None.
        layers: pattern for the names of the layers to change (``blocks.*.moe``).

    Raises:
        ConfigError: if a schedule is empty or has an invalid step; at the start of a fit, if no
            layer matches or a layer doesn't accept a value in a dict.
    """

    def __init__(
        self,
        capacity_factor: Schedule | None = None,
        eval_capacity_factor: Schedule | None = None,
        top_k: Schedule | None = None,
        noise: Schedule | None = None,
        interpolation: Literal["step", "linear"] = "step",
        layers: str = "*",
    ) -> None:
        given = {
            "capacity_factor": capacity_factor,
            "eval_capacity_factor": eval_capacity_factor,
            "top_k": top_k,
            "noise": noise,
        }
        self.schedules = {name: x for name, x in given.items() if x is not None}
        if not self.schedules:
            raise ConfigError(
                f"CapacitySchedule has nothing to change. Give it one of: {', '.join(given)}."
            )
        if interpolation not in ("step", "linear"):
            raise ConfigError(
                f"interpolation={interpolation!r} is unknown. It must be 'step' or 'linear'."
            )
        for name, schedule in self.schedules.items():
            if isinstance(schedule, dict):
                _check_steps(name, schedule)
        self.interpolation = interpolation
        self.layers = layers
        self._followers: list[MoE] = []
        self._step = -1

    def value(self, name: str, step: int) -> float | None | Literal["unchanged"]:
        """The value of ``name`` at an optimizer step, counted from 0."""
        schedule = self.schedules[name]
        if not isinstance(schedule, dict):
            return schedule(step)
        reached = [s for s in schedule if s <= step]
        if not reached:
            return "unchanged"
        start = max(reached)
        held = schedule[start]
        later = [s for s in schedule if s > step]
        if self.interpolation == "step" or held is None or not later:
            return held
        end = min(later)
        target = schedule[end]
        if target is None:
            return held
        between = held + (target - held) * (step - start) / (end - start)
        return round(between) if name == "top_k" else between

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = -1
        found = dict(moe_layers(pl_module))
        self._followers = [
            layer for name, layer in found.items() if fnmatch.fnmatchcase(name, self.layers)
        ]
        if not self._followers:
            raise ConfigError(
                f"layers={self.layers!r} matches no MoE layer; the model has:"
                f" {', '.join(found) or 'none'}."
            )
        # Try all values of a dict on all layers now, so that errors don't surface days later.
        for name, schedule in self.schedules.items():
            for layer in self._followers:
                before = _get(layer, name)
                for value in schedule.values() if isinstance(schedule, dict) else ():
                    _set(layer, name, value)
                _set(layer, name, before)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        for name in self.schedules:
            value = self.value(name, step)
            if value != "unchanged":
                for layer in self._followers:
                    _set(layer, name, value)


def _check_steps(name: str, schedule: dict[int, float | None]) -> None:
    steps = list(schedule)
    if not steps or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in steps):
        raise ConfigError(
            f"{name}={schedule!r} is invalid: it must have at least one optimizer step, and steps"
            " must be integers of at least 0."
        )


def _noise_name(layer: MoE) -> str:
    for name in NOISES:
        if hasattr(layer.router, name):
            return name
    raise ConfigError(
        f"noise: {type(layer.router).__name__} of {layer.layer_name} has no noise to change."
        " Use router='noisy' or 'switch', or exclude the layer with layers=."
    )


def _get(layer: MoE, name: str) -> Any:
    return getattr(layer.router, _noise_name(layer)) if name == "noise" else getattr(layer, name)


def _set(layer: MoE, name: str, value: Any) -> None:
    if name == "noise":
        attribute = _noise_name(layer)
        limit = 1.0 if attribute == "jitter" else math.inf
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not (valid and 0 <= value < limit):
            raise ConfigError(
                f"noise={value!r} is invalid for {layer.layer_name}: it must be at least 0 and"
                f" less than {limit}."
            )
        setattr(layer.router, attribute, float(value))
        return
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)  # the command line may pass a float
    setattr(layer, name, value)
