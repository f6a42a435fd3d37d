"""Saves and restores the states of this process's random number generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch and the device, as plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  the global one
    kind, words, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "python": (kind, np.asarray(words, dtype="<u4").tobytes(), next_gauss),
        "numpy": (name, np.asarray(keys, dtype="<u4").tobytes(), position, has_gauss, gauss),
        "torch": _to_bytes(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _to_bytes(torch.cuda.get_rng_state(device))
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores :func:`random_state`; a CUDA state is ignored on other devices."""
    kind, data, next_gauss = state["python"]
    random.setstate((kind, tuple(np.frombuffer(data, dtype="<u4").tolist()), next_gauss))
    name, keys, position, has_gauss, gauss = state["numpy"]
    words = np.frombuffer(keys, dtype="<u4")
    np.random.set_state((name, words, position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(_from_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_from_bytes(state["cuda"]), device)


def _to_bytes(state: Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _from_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
