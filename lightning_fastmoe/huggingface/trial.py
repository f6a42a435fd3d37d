"""Measures on a GPU what passes of a model of transformers cost, with a few of its layers."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.scoring import chunked_loss
from lightning_fastmoe.huggingface.sharded_experts import kind
from lightning_fastmoe.inference.chunks import ChunkedBlocks
from lightning_fastmoe.ops.group_quantization import bits_of, dequantize_groups, quantize_groups
from lightning_fastmoe.planning.offload import OffloadCosts
from lightning_fastmoe.planning.offload_sizes import OffloadSizes

_ASSUMED_LINK, _ASSUMED_FLOPS = 53e9, 300e12
"""Of an H100 with PCIe 5, whose models compute at about this rate in bf16."""


def skeleton(
    config: Any,
    layers: int | None = None,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """The causal language model of a config, with this package's experts.

    Args:
        config: of transformers.
        layers: how many of its layers; None for all.
        device: where; on ``"meta"`` it takes no memory, else weights are random.
        dtype: of the weights.

    Raises:
        ConfigError: if transformers has no causal language model for it.
    """
    import transformers

    from lightning_fastmoe.huggingface.experts_interface import register_experts

    register_experts()
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:layers]
    try:
        with torch.device(device):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation="fastmoe"
            )
    except ValueError as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"No language model of {type(config).__name__}: {reason}") from error
    return model.eval()


def sizes_of(config: Any, compression: str | None = None) -> OffloadSizes:
    """Bytes of the model of a config.

    Args:
        config: of transformers.
        compression: of the experts, ``"int8"`` or ``"int4"``.

    Raises:
        ConfigError: if it has no stacked experts, or there is no such compression.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * heads * width
    if getattr(config, "kv_lora_rank", None):  # latents and one key's positions for all heads
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    cache = 2 * config.num_hidden_layers * numbers
    return OffloadSizes.of(skeleton(config), cache, compression, config.num_hidden_layers)


def assumed_costs(
    config: Any, tokens: int, sequences: int, chunk: int | None = None
) -> OffloadCosts:
    """Costs by the model's size alone, for an H100; see :func:`measured_costs`."""
    model = skeleton(config)
    active = float(sum(parameter.numel() for parameter in model.parameters()))
    for path, layer in kind.layers(model):
        if layer.top_k is None:
            raise ConfigError(f"How many experts of {path} a token has is unknown: use --measure.")
        total = sum(parameter.numel() for parameter in layer.module.parameters())
        active -= total * (1 - layer.top_k / layer.num_experts)
    seconds = 2 * active / _ASSUMED_FLOPS
    # Inside a block 24 times the hidden states of its tokens; between blocks those of all, twice.
    inside = tokens if chunk is None else tokens * min(chunk, sequences) // sequences
    outside = 0 if chunk is None else 2 * tokens
    activations = (24 * inside + outside) * config.hidden_size * 2
    return OffloadCosts(_ASSUMED_LINK, tokens * seconds, 0.0, activations, sequences * seconds)


@torch.no_grad()
def measured_costs(
    config: Any,
    sequences: int,
    length: int,
    generates: bool,
    compression: str | None = None,
    chunk: int | None = None,
) -> OffloadCosts:
    """Measures passes of models with one and two layers with experts, and the link.

    A pass is hidden states and the loss of the next token, whose logits are computed in chunks.

    Args:
        config: of transformers.
        sequences: of a pass.
        length: tokens of each.
        generates: whether steps of generation are measured, too.
        compression: of the experts, which is measured, too.
        chunk: sequences that blocks compute at a time; None for all.

    Raises:
        ConfigError: without a GPU, or if the model has fewer than two layers with experts.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--measure needs a GPU.")
    first, second, total = _layers_to_compare(config)
    ids = torch.randint(config.vocab_size, (sequences, length), device="cuda")
    seconds, steps, activations = [], [], 0
    for layers in (first, second):
        model: Any = skeleton(config, layers, "cuda")
        if chunk is not None:
            ChunkedBlocks(model, chunk, nullcontext)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backbone = model.base_model
        seconds.append(_seconds(partial(backbone, input_ids=ids, use_cache=False)))
        if generates:
            steps.append(_seconds(partial(model, input_ids=ids[:, :1], use_cache=False)))
        if layers == second:
            hidden = backbone(input_ids=ids, use_cache=False)[0]
            head = _seconds(partial(chunked_loss, model, hidden, ids))
            activations = torch.cuda.max_memory_allocated() - before
        del model, backbone
        torch.cuda.empty_cache()
    layer = (seconds[1] - seconds[0]) / (second - first)
    if layer <= 0:
        raise ConfigError(
            f"A pass of {sequences} x {length} tokens is too short to measure: one more layer took"
            f" {1000 * layer:.3f} ms. Use more tokens."
        )
    outside = max(0.0, seconds[0] - first * layer) + head
    step = 0.0
    if generates:
        step = steps[0] + (total - first) * max(0.0, steps[1] - steps[0]) / (second - first)
    rate = OffloadCosts.decompression if compression is None else _decompression(compression)
    return OffloadCosts(_link(), total * layer, outside, activations, step, rate, is_measured=True)


def _layers_to_compare(config: Any) -> tuple[int, int, int]:
    """Numbers of first layers, of which the second has one more with experts; and all."""
    total = config.num_hidden_layers
    model = skeleton(config)
    with_experts = [
        int(part) + 1
        for path, _ in kind.layers(model)
        for part in path.split(".")
        if part.isdigit()
    ]
    if len(with_experts) < 2:
        raise ConfigError("--measure compares models with one and two layers with experts.")
    return with_experts[0], with_experts[1], total


def _decompression(compression: str) -> float:
    """Bytes per second of decompressed bf16 weights."""
    bits = bits_of(compression)
    weights = torch.randn(1 << 18, 2048, device="cuda", dtype=torch.bfloat16)
    codes, scales = quantize_groups(weights, bits)
    return weights.nbytes / _seconds(lambda: dequantize_groups(codes, scales, weights, bits))


def _link() -> float:
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device="cuda")
    return host.numel() / _seconds(lambda: there.copy_(host, non_blocking=True))


def _seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """The median of some runs after two, by CUDA events."""
    for _ in range(2):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return float(statistics.median(times)) / 1000
