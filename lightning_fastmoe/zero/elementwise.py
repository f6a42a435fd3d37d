"""Tests whether an optimizer is elementwise, as ZeRO's flat partitions require.

ZeRO gives the optimizer flat fragments of a group's parameters, cut where a rank's share ends. An
optimizer that looks at a parameter as a whole (its shape, its norm) then trains without an error,
but otherwise than it should, and differently on every number of ranks. Its class does not say so,
so a copy of it is tried on one small matrix, and on the same numbers in two flat fragments.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

_CUT = 7
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
    start = _numbers(0, device)
    try:
        whole, again = (_train(optimizer, group, start.view(4, 6), seed=seed) for seed in (0, 1))
    except Exception:  # noqa: BLE001  whatever a stranger's step raises, at its first real one too
        return None
    if not torch.equal(whole, again):
        return None
    try:  # each fragment by a copy that sees nothing else, as on a rank
        fragments = [
            _train(optimizer, group, start[part], part, seed=0)
            for part in (slice(_CUT), slice(_CUT, None))
        ]
    except Exception:  # noqa: BLE001  one that wants matrices, for one
        return False
    way = (whole - start).abs().max()
    return bool((torch.cat(fragments) - whole).abs().max() <= _TOLERANCE * way)


def _train(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    start: Tensor,
    part: slice = slice(None),
    *,
    seed: int,
) -> Tensor:
    """What some steps make of a parameter that holds a part of the numbers, flat."""
    parameter = torch.nn.Parameter(start.clone())
    trial = _copy(optimizer, group, parameter)
    is_cuda = start.device.type == "cuda"
    with torch.random.fork_rng(devices=[start.device] if is_cuda else []):
        # Not torch.manual_seed(), which seeds every GPU, whose numbers nobody would put back.
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            torch.cuda.default_generators[start.device.index].manual_seed(seed)
        for step in range(1, _STEPS + 1):
            parameter.grad = _numbers(step, start.device)[part].clone().view(start.shape)
            type(trial).step(trial)
    return parameter.detach().flatten()


def _copy(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter
) -> torch.optim.Optimizer:
    """With its own state, no hooks, and the options of a group."""
    trial: torch.optim.Optimizer = object.__new__(type(optimizer))
    for key, value in vars(optimizer).items():  # copy.copy forgets what a subclass adds
        setattr(trial, key, copy.copy(value) if isinstance(value, dict | list | set) else value)
    options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    if isinstance(rate := options.get("lr"), (float, int, Tensor)):
        options["lr"] = torch.full_like(rate, 0.01) if isinstance(rate, Tensor) else 0.01
    trial.param_groups = [{**options, "params": [parameter]}]
    trial.state = defaultdict(dict)
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(trial, hooks, OrderedDict())
    return trial


def _numbers(step: int, device: torch.device) -> Tensor:
    """24 values of either sign whose size grows, so that fragments have norms of their own."""
    i = torch.arange(24, dtype=torch.float32)
    values = torch.sin(i * (step + 1) + step) * (0.05 + i / 12)
    return values.to(device)
