"""The compiled kernels as ``torch.ops.lightning_fastmoe``, loaded at the first CUDA tensor."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.ops import _build, stall
from lightning_fastmoe.ops.activation import is_gated

NAMESPACE = "lightning_fastmoe"
TRACED_NAMESPACE = "lightning_fastmoe_traced"
"""Of operators in Python for ``torch.compile``; :data:`NAMESPACE` is filled when it is loaded."""
MAX_EXPERTS = 1024
"""Largest number of experts per layer that routing's kernels support."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Floating dtypes that the kernels support."""


_LOADING = threading.Lock()  # autograd's threads may be the first to load, concurrently


@functools.cache
def load() -> Any | None:
    """The namespace of the operators; None if they are unavailable (one warning says why).

    The first call compiles them if there is no library yet. Only the first process of a node warns,
    since the reason is the same for all.
    """
    with _LOADING:
        return _load()[0]


def unavailable_reason() -> str:
    """Why the kernels don't run here, "" if they do."""
    with _LOADING:
        return _load()[1]


@functools.cache
def _load() -> tuple[Any | None, str]:
    outcome = _build.build()
    reason = outcome.reason
    if outcome.library is not None:
        try:
            torch.ops.load_library(str(outcome.library))
        except OSError as error:
            # For example, built against another libc, or truncated.
            reason = (
                f"{outcome.library} can't be loaded: {error.__cause__ or error}; delete it, or"
                " build it again on a machine like this (lightning-fastmoe build --force)"
            )
        else:
            register_fakes()
            library = getattr(torch.ops, NAMESPACE)
            stall.watch(library)
            return library, ""
    if (
        torch.cuda.is_available()
        and outcome.state != "off"
        and os.environ.get("LOCAL_RANK", "0") == "0"
    ):
        warnings.warn(
            "lightning_fastmoe computes with PyTorch's operators, not its own CUDA kernels:"
            f" {reason}. (LIGHTNING_FASTMOE_KERNELS=0 silences this.)",
            stacklevel=4,
        )
    return None, reason


def native(*tensors: Tensor) -> Any | None:
    """The operators, if they support these tensors: on CUDA, floating ones in :data:`DTYPES`.

    They don't support autograd, so they are not used while a graph is being recorded, as in a
    double backward; this package's autograd functions run forward and backward without one.
    """
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cuda or (tensor.is_floating_point() and tensor.dtype not in DTYPES):
            return None
        if recording and tensor.requires_grad:
            return None
    # torch.compile traces the torch twins of what isn't one of its operators as a whole.
    return None if torch.compiler.is_dynamo_compiling() else load()


def register_fakes() -> None:
    """Registers the shapes and dtypes of all results, for fake tensors and opcheck."""
    fakes: dict[str, Callable[..., Any]] = {
        "route": _route,
        "route_backward": lambda logits, *_: torch.empty_like(logits),
        "balancing_losses": lambda scores, logits, counts, of_balancing, of_z: (
            logits.new_empty(3),
            logits.new_empty(logits.shape[1]),
        ),
        "balancing_losses_backward": lambda logits, share, a, b, c, of_balancing, of_z: (
            logits.new_empty(logits.shape[1]),
            logits.new_empty(logits.shape[0] if of_z > 0 else 0, logits.shape[1]),
        ),
        "sort_by_expert": _sort_by_expert,
        "permute_rows": lambda x, inverse, top_k: x.new_empty(x.shape[0] * top_k, x.shape[1]),
        "sum_rows": _sum_rows,
        "unpermute_backward": lambda grad, y, weights, inverse: (
            torch.empty_like(y),
            torch.empty_like(weights),
        ),
        "activation": _activation,
        "activation_backward_": lambda h, d_act, weights, *_: torch.empty_like(weights),
        "zero_empty_experts_": lambda grad, tokens_per_expert: None,
        "adam_step_": lambda *_: None,
        "dequantize_groups_": lambda *_: None,
        "exchange_push": lambda *_: None,
        "exchange_send": lambda *_: None,
        "exchange_plan": _exchange_plan,
        "exchange_receive": _exchange_receive,
        "exchange_receive_ahead": _exchange_receive_ahead,
        "exchange_sums": lambda rows, inverse, offsets, most: rows.new_empty(
            inverse.shape[0] // (offsets.shape[0] - 1), rows.shape[1]
        ),
        "exchange_slots": lambda memory, at, block_bytes, inverse, offsets, owner: owner.new_empty(
            owner.shape, dtype=torch.float32
        ),
        "exchange_layer_start": lambda x, chosen, where, weights, control, *_: _exchange_plan(
            chosen, where, weights, len(control)
        ),
        "exchange_layer_forward": _exchange_layer_forward,
        "exchange_layer_combine": lambda sums, ends, inverse, *_: sums.new_empty(
            inverse.shape[0] // ends.shape[0], sums.shape[1]
        ),
        "exchange_layer_backward_": _exchange_layer_backward,
        "exchange_announce": lambda *_: None,
        "exchange_await": lambda *_: None,
        "exchange_set_flags": lambda *_: None,
        "exchange_wait": lambda *_: None,
        "expert_layer": _expert_layer,
        "expert_layer_backward_": _expert_layer_backward,
        "hopper_up_forward": _up_forward,
        "hopper_backward_activation_": lambda grad, order, offsets, down, h, weights, name: (
            h.new_empty(h.shape[0], down.shape[2]),
            torch.empty_like(weights),
        ),
        "hopper_rows_product": lambda rows, offsets, weight, transposed, *_: rows.new_empty(
            rows.shape[0], weight.shape[1 if transposed else 2]
        ),
        "hopper_weight_gradient": _weight_gradient,
        "hopper_bf16_parts": lambda x, parts: x.new_empty(
            x.shape[0], parts, -(-x.shape[1] // 8) * 8, dtype=torch.bfloat16
        ),
        "hopper_router_logits": lambda x, weight: x.new_empty(
            x.shape[0], weight.shape[0], dtype=torch.float32
        ),
        "hopper_router_weight_gradient": lambda x, gradient, parts, experts, in_bf16: x.new_empty(
            experts, x.shape[1], dtype=torch.bfloat16 if in_bf16 else torch.float32
        ),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)


def _route(
    logits: Tensor, selection_bias: Tensor | None, top_k: int, normalize: bool, sigmoid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    weights = logits.new_empty(tokens, top_k)
    return torch.empty_like(logits), weights, weights.new_empty(tokens, top_k, dtype=torch.int64)


def _sort_by_expert(
    ids: Tensor, num_experts: int, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = ids.new_empty(num_experts)
    offsets = ids.new_empty(num_experts, dtype=torch.int32)
    return torch.empty_like(ids), torch.empty_like(ids), counts, offsets


def _exchange_plan(
    chosen: Tensor, where: Tensor, weights: Tensor, ranks: int
) -> tuple[Tensor, ...]:
    tokens, slots = chosen.shape
    pairs = chosen.new_empty(tokens * ranks)
    return (
        *(pairs, torch.empty_like(pairs)),
        chosen.new_empty(ranks + 1, dtype=torch.int32),
        chosen.new_empty(tokens, slots, dtype=torch.int32),
        chosen.new_empty(tokens * ranks, 8 * slots, dtype=torch.uint8),
        chosen.new_empty(where.shape[1] - 1),
        chosen.new_empty(ranks + 1),
    )


def _exchange_receive(
    memory: Tensor,
    at: int,
    block_bytes: int,
    row_bytes: int,
    counts: list[int],
    packed_at: int,
    packed_block_bytes: int,
    slots: int,
    num_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = sum(counts)
    return (
        memory.new_empty(rows, row_bytes),
        memory.new_empty(rows, slots, dtype=torch.float32),
        memory.new_empty(rows, slots, dtype=torch.int64),
        memory.new_empty(len(counts), dtype=torch.int32),
    )


def _exchange_receive_ahead(
    memory: Tensor,
    at: int,
    block_bytes: int,
    row_bytes: int,
    rows: int,
    packed_at: int,
    packed_block_bytes: int,
    slots: int,
    num_local: int,
    control: Tensor,
    where: Tensor,
    rank: int,
    ranks: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        memory.new_empty(rows, row_bytes),
        memory.new_empty(rows, slots, dtype=torch.float32),
        memory.new_empty(rows, slots, dtype=torch.int64),
        memory.new_empty(ranks, dtype=torch.int32),
    )


def _exchange_layer_forward(
    control: list[Tensor],
    memory: Tensor,
    where: Tensor,
    up: Tensor,
    down: Tensor,
    rank: int,
    slots: int,
    rows: int,
    pairs: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    held, width, d_model = up.shape
    return (
        up.new_empty(rows, d_model),
        up.new_empty(rows, slots, dtype=torch.float32),
        up.new_empty(len(control), dtype=torch.int32),
        up.new_empty(pairs, dtype=torch.int64),
        up.new_empty(rows * slots, dtype=torch.int64),
        up.new_empty(held, dtype=torch.int64),
        up.new_empty(held, dtype=torch.int32),
        up.new_empty(rows, d_model),
        up.new_empty(pairs if rest[-1] else 0, width),
    )


def _exchange_layer_backward(
    grad: Tensor,
    pair_order: Tensor,
    pair_inverse: Tensor,
    pair_offsets: Tensor,
    owner: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    up, down = rest[12:14]
    return (
        torch.empty_like(grad),
        owner.new_empty(owner.shape, dtype=torch.float32),
        torch.empty_like(up) if rest[-2] else up.new_empty(0),
        torch.empty_like(down) if rest[-1] else down.new_empty(0),
    )


def _sum_rows(
    rows: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int, *_: Tensor | None
) -> Tensor:
    return rows.new_empty(inverse.shape[0] // top_k, rows.shape[1])


def _activation(h: Tensor, bias: Tensor | None, offsets: Tensor | None, name: str) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2 if is_gated(name) else h.shape[1])


def _expert_layer(
    x: Tensor, weights: Tensor | None, up: Tensor, down: Tensor, order: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    keep_h, on_hopper = rest[-2:]
    rows = x.shape[0] if order is None else order.shape[0]
    if keep_h:
        return torch.empty_like(x), x.new_empty(rows, up.shape[1])
    return torch.empty_like(x), x.new_empty(0, up.shape[1]) if on_hopper else x.new_empty(0)


def _expert_layer_backward(*args: Any) -> tuple[Tensor, ...]:
    _, x, _, weights, up, down = args[:6]
    wants = iter(args[-5:-2])
    results = (torch.empty_like(t) if next(wants) else t.new_empty(0) for t in (x, up, down))
    d_x, d_up, d_down = results
    return d_x, torch.empty_like(weights), d_up, d_down


def _up_forward(
    x: Tensor,
    order: Tensor,
    top_k: int,
    offsets: Tensor,
    up: Tensor,
    bias: Tensor | None,
    name: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(order.shape[0], up.shape[1])
    return h if keep_h else h.new_empty(0, up.shape[1]), _activation(h, None, None, name)


def _weight_gradient(
    gathered: Tensor, order: Tensor, top_k: int, rows: Tensor, offsets: Tensor, transposed: bool
) -> Tensor:
    sizes = (gathered.shape[1], rows.shape[1])
    return gathered.new_empty(offsets.shape[0], *(reversed(sizes) if transposed else sizes))


__all__ = ["load", "native", "register_fakes", "unavailable_reason"]
