"""Whether an optimizer updates each element on its own, as ZeRO's flat partitions need.

ZeRO gives the optimizer a flat piece of all parameters of a group, cut where a rank's share ends.
An optimizer that looks at a parameter as a whole (its shape, its norm) then trains without an
error, but otherwise than it should, and differently on every number of ranks. Its class does not
say so, so a copy of it is tried on one small matrix, and on the same numbers in two flat pieces.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

_STEPS = 8  # RAdam takes plain steps at first
_TOLERANCE = 1e-4  # of the longest way that an element went; what depends on norms differs by 1e-2


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool | None:
    """Tries a copy of an optimizer, with the options of each of its groups.

    Nothing of the optimizer changes, nor do random numbers; the copy's learning rate is not that of
    a scheduler, which may begin at zero.

    Args:
        optimizer: not of DeepSpeed, whose copies would share memory outside of Python.

    Returns:
        None if it can't be told: the copy takes no step on a matrix without a closure (or asks for
        sparse gradients, or for another device), or its steps are random.
    """
    if hasattr(type(optimizer), "__del__"):
        return None  # owns something that a copy would give back
    answers = [_try_group(optimizer, group) for group in optimizer.param_groups]
    if False in answers:
        return False
    return None if None in answers else True


def _try_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool | None:
    device = next((p.device for p in group["params"]), torch.device("cpu"))
    try:
        whole, again = (_train(optimizer, group, device, seed=seed) for seed in (0, 1))
    except Exception:  # noqa: BLE001  whatever a stranger's step raises, at its first real one too
        return None
    if not torch.equal(whole, again):
        return None
    try:
        pieces = _train(optimizer, group, device, seed=0, cuts=(7,))
    except Exception:  # noqa: BLE001  one that wants matrices, for one
        return False
    way = (whole - _numbers(0, device)).abs().max()
    return bool((pieces - whole).abs().max() <= _TOLERANCE * way)


def _train(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    device: torch.device,
    *,
    seed: int,
    cuts: tuple[int, ...] = (),
) -> Tensor:
    """The 24 numbers after some steps, as one matrix or cut into flat pieces."""
    start = _numbers(0, device)
    bounds = [0, *cuts, start.numel()]
    slices = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    parameters = [torch.nn.Parameter(start[s].clone()) for s in slices]
    if not cuts:
        parameters = [torch.nn.Parameter(start.view(4, 6).clone())]
    trial = _copy(optimizer, group, parameters)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for step in range(1, _STEPS + 1):
            gradient = _numbers(step, device)
            for parameter, s in zip(parameters, slices, strict=True):
                parameter.grad = gradient[s].clone().view(parameter.shape)
            type(trial).step(trial)
    return torch.cat([p.detach().flatten() for p in parameters])


def _copy(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """With its own state, no hooks, and the options of a group."""
    trial: torch.optim.Optimizer = object.__new__(type(optimizer))
    for key, value in vars(
        optimizer
    ).items():  # copy.copy leaves out what a subclass has of its own
        setattr(trial, key, copy.copy(value) if isinstance(value, dict | list | set) else value)
    options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    if isinstance(rate := options.get("lr"), (float, int, Tensor)):
        options["lr"] = torch.full_like(rate, 0.01) if isinstance(rate, Tensor) else 0.01
    trial.param_groups = [{**options, "params": parameters}]
    trial.state = defaultdict(dict)
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(trial, hooks, OrderedDict())
    return trial


def _numbers(step: int, device: torch.device) -> Tensor:
    """24 values of either sign whose size grows, so that pieces have norms of their own."""
    i = torch.arange(24, dtype=torch.float32)
    values = torch.sin(i * (step + 1) + step) * (0.05 + i / 12)
    return values.to(device)
