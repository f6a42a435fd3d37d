"""Tests whether an optimizer is elementwise, as ZeRO's flat partitions require.

ZeRO gives the optimizer a flat slice of all parameters of a group, cut at the boundary of a rank's
shard. An optimizer that depends on whole parameters (their shape or norm) then trains without an
error, but incorrectly, and differently for each number of ranks. Its class doesn't tell, so a copy
of it is run on one small matrix, and on the same numbers in two flat fragments.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

_CUT = 7
_STEPS = 8  # RAdam takes plain steps at first
_TOLERANCE = 1e-4  # relative to the largest change of an element; norms make a difference of 1e-2


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool | None:
    """Tries a copy of an optimizer, with the options of each of its groups.

    The optimizer and the random states are left unchanged. The copy has its own learning rate, as a
    scheduler's may start at zero.

    Args:
        optimizer: any but DeepSpeed's, whose copies would share native memory.

    Returns:
        None if unknown: the copy can't step on a matrix without a closure (or needs sparse
        gradients, or another device), or its steps are random.
    """
    if hasattr(type(optimizer), "__del__"):
        return None  # owns a resource that a copy would release
    answers = [_try_group(optimizer, group) for group in optimizer.param_groups]
    if False in answers:
        return False
    return None if None in answers else True


def _try_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool | None:
    device = next((p.device for p in group["params"]), torch.device("cpu"))
    start = _numbers(0, device)
    try:
        whole, again = (_train(optimizer, group, start.view(4, 6), seed=seed) for seed in (0, 1))
    except Exception:  # noqa: BLE001  a third-party step() may raise anything
        return None
    if not torch.equal(whole, again):
        return None
    try:  # each fragment by its own copy, as on a rank
        fragments = [
            _train(optimizer, group, start[part], part, seed=0)
            for part in (slice(_CUT), slice(_CUT, None))
        ]
    except Exception:  # noqa: BLE001  for example, one that needs matrices
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
    """The values, flat, of a parameter that holds a part of the numbers, after some steps."""
    parameter = torch.nn.Parameter(start.clone())
    trial = _copy(optimizer, group, parameter)
    is_cuda = start.device.type == "cuda"
    with torch.random.fork_rng(devices=[start.device] if is_cuda else []):
        # Not torch.manual_seed(): it seeds every GPU, and their states would not be restored.
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
    """A copy with its own state, no hooks, and the options of a group."""
    trial: torch.optim.Optimizer = object.__new__(type(optimizer))
    for key, value in vars(optimizer).items():  # copy.copy drops attributes of subclasses
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
    """24 values of both signs and growing size, so that the norms of fragments differ."""
    i = torch.arange(24, dtype=torch.float32)
    values = torch.sin(i * (step + 1) + step) * (0.05 + i / 12)
    return values.to(device)
