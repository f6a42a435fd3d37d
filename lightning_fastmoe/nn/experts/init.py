"""Initial weights seeded by (seed, layer, expert id): one seed gives one model on any topology."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

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

    inference = torch.is_inference_mode_enabled()

    def draw(expert_id: int, target: Tensor) -> Tensor:
        """The values of one expert; in ``target`` itself where torch can draw them there."""
        in_place = target.device.type == "cpu" and target.dtype == torch.float32
        in_place &= target.is_contiguous()  # else torch draws in another order
        generator = expert_generator(layer_seed, name, expert_id)
        with torch.inference_mode(inference), torch.no_grad():  # a thread has its own modes
            values = target
            if not in_place:
                values = torch.empty(target.shape, dtype=torch.float32, device="cpu")
            if std is None:
                bound = fan_in**-0.5
                return values.uniform_(-bound, bound, generator=generator)
            return values.normal_(0.0, std, generator=generator)

    # torch draws with one thread, and without the GIL. Copies to other devices are made here, on
    # the caller's stream; and so is everything in a mode that makes other tensors, such as
    # FakeTensorMode, which other threads are not in.
    pairs = zip(expert_ids, stacked, strict=True)
    if stacked.numel() < _WORTH_THREADS or type(torch.empty(0)) is not Tensor:
        for expert_id, target in pairs:
            _place(target, draw(expert_id, target))
        return
    at_once = max(1, min(2 * _cores(), _BYTES_AT_ONCE // (4 * stacked[0].numel())))
    drawn: deque[tuple[Tensor, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(_cores()) as pool:
        for expert_id, target in pairs:
            if len(drawn) == at_once:
                first, values = drawn.popleft()
                _place(first, values.result())
            drawn.append((target, pool.submit(draw, expert_id, target)))
        for target, values in drawn:
            _place(target, values.result())


def _place(target: Tensor, values: Tensor) -> None:
    if values is not target:
        target.copy_(values)


def _cores() -> int:
    """The cores of this machine that are this rank's share."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
