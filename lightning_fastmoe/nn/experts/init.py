"""Initial weights seeded by (seed, layer, expert id): one seed gives one model on any topology."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

_BYTES_AT_ONCE = 1 << 30
"""Memory for values that are drawn, but not copied yet."""
_WORTH_THREADS = 1 << 20
"""Values that take longer to draw than threads take to start."""


def draw_layer_seed() -> int:
    """A seed for the layer that is being built, drawn from torch's global CPU generator.

    Every layer takes exactly one draw whichever experts it holds, so ranks that start from the same
    global seed build the same layers, and the same modules after them, on any topology.
    """
    return int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu"))


def expert_generator(layer_seed: int, parameter: str, expert_id: int) -> torch.Generator:
    """The random generator of one parameter of the expert with this global id."""
    key = f"{layer_seed}/{parameter}/{expert_id}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
    return generator


@torch.no_grad()
def init_experts_(
    stacked: Tensor,
    *,
    name: str,
    layer_seed: int,
    expert_ids: Iterable[int],
    fan_in: int,
    std: float | None,
) -> None:
    """Fills ``stacked (e, ...)`` with the initial values of these experts.

    Drawn in fp32 on the CPU, so that every device and dtype starts from the same numbers.

    Args:
        stacked: one slice per local expert.
        name: the parameter's name, part of the seed.
        layer_seed: from :func:`draw_layer_seed`.
        expert_ids: global ids, one for each slice.
        fan_in: inputs of the projection.
        std: standard deviation of a normal distribution; None draws from U(-b, b) with
            ``b = 1 / sqrt(fan_in)``, as ``torch.nn.Linear`` does.
    """

    def draw(expert_id: int) -> Tensor:
        generator = expert_generator(layer_seed, name, expert_id)
        values = torch.empty(stacked.shape[1:], dtype=torch.float32, device="cpu")
        if std is None:
            bound = fan_in**-0.5
            return values.uniform_(-bound, bound, generator=generator)
        return values.normal_(0.0, std, generator=generator)

    # torch draws with one thread, and without the GIL. Copies are made here, as other threads are
    # in none of the context managers that the caller has entered; so are all draws inside of one
    # that makes other tensors, such as FakeTensorMode.
    at_once = 1
    if stacked.numel() >= _WORTH_THREADS and type(torch.empty(0)) is Tensor:
        at_once = max(1, min(_cores(), _BYTES_AT_ONCE // (4 * stacked[0].numel())))
    pairs = zip(expert_ids, stacked, strict=True)
    with ThreadPoolExecutor(at_once) as pool:  # starts no thread before it is given work
        run = pool.map if at_once > 1 else map
        while some := list(islice(pairs, at_once)):
            drawn = run(draw, [expert_id for expert_id, _ in some])
            for values, (_, target) in zip(drawn, some, strict=True):
                target.copy_(values)


def _cores() -> int:
    """The cores of this machine that are this rank's share."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
