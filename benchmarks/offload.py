"""Scoring with experts in host memory, beside the same model on the GPU as a whole.

    python benchmarks/offload.py
    python benchmarks/offload.py --model mixtral-8x7b
    python benchmarks/offload.py --layers 8 --tokens 8192 65536 --peers

A model of the sizes of --model, bf16, with random weights, scores sequences of --seq-len tokens: a
pass is the hidden states of --tokens tokens and their loss, whose logits are computed in chunks.
The offloaded rows may use --gpu-memory, enforced by torch; the resident one all of it. Times are by
CUDA events from the end of one pass to the end of the next, medians of --passes after one. Losses
must have the same bits; with --groups they must be within 1e-4. With --chunk rows compute blocks
in chunks of so many sequences. --generate adds steps of greedy generation for each number of
--sequences, by transformers' generate, with the bytes that a step copies, and once more with
--expert-cache; texts are not compared: torch's attention with a cache gives other bits each time,
also with the resident model. With random weights, how often a step chooses the experts of the one
before says little of a trained model. --host-cache keeps keys and values of the offloaded rows in
host memory. --compression adds a row for experts in int8 or int4, whose losses differ by what is
printed; with random weights that says nothing about a trained model. --peers adds Accelerate's
cpu_offload around transformers' own experts.

Prints a line of JSON for each measurement, then a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.huggingface import HostCache
from lightning_fastmoe.huggingface.scoring import chunked_loss
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.chunks import ChunkedBlocks
from lightning_fastmoe.planning.offload_sizes import parse_bytes

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
    "mixtral-8x7b": ("mixtral", {"num_hidden_layers": 32}),  # transformers' defaults
    "tiny": (
        "qwen3_moe",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),  # for trials
}
"""transformers' family, and what its config says."""


def device() -> torch.device:
    """The GPU; the CPU for a trial."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_of(name: str, layers: int | None = None) -> Any:
    """The config of one of :data:`MODELS`, with fewer layers if asked."""
    from transformers import AutoConfig

    family, sizes = MODELS[name]
    options = {"max_position_embeddings": 4096, "use_cache": False, "tie_word_embeddings": False}
    if layers is not None:
        options["num_hidden_layers"] = layers
    return AutoConfig.for_model(family, **{**sizes, **options})


def build(name: str, layers: int | None = None) -> nn.Module:
    """The model on the CPU, its weights drawn on the GPU, which takes a minute for 60 GB."""
    from transformers import AutoModelForCausalLM

    config = config_of(name, layers)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", experts_implementation="fastmoe"
        )
    generator = torch.Generator(device()).manual_seed(0)
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                host = torch.empty(old.shape, dtype=torch.bfloat16)
                if old.dim() == 1:
                    host.fill_(1.0)
                else:
                    drawn = torch.randn(old.shape, generator=generator, device=device())
                    host.copy_((0.02 * drawn).bfloat16())
                module._parameters[name] = nn.Parameter(host, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # type: ignore[union-attr, operator]
    return model.eval()


def score(model: Any, ids: Tensor) -> Tensor:
    """The mean loss of the next token."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return chunked_loss(model, hidden, ids)


def measure(name: str, model: Any, args: argparse.Namespace, most: int) -> list[Any]:
    """Rows of one way, with growing passes up to ``most`` tokens."""
    rows = []
    for tokens in args.tokens:
        if tokens > most:
            continue
        generator = torch.Generator().manual_seed(tokens)
        shape = (tokens // args.seq_len, args.seq_len)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator).cuda()
        torch.cuda.reset_peak_memory_stats()
        try:
            times, loss = timed(lambda ids=ids: score(model, ids), args.passes)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            print(f"{name}, {tokens} tokens: out of memory", file=sys.stderr)
            break
        ms = statistics.median(times)
        row = {"row": name, "tokens": tokens, "ms": round(ms, 1), "loss": loss}
        row["tokens_per_s"] = round(1000 * tokens / ms)
        row["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def timed(work: Callable[[], Tensor], passes: int) -> tuple[list[float], float]:
    """Milliseconds of each pass but the first, and what the last returned."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
    for event in events:
        result = work()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)], result.item()


def compressed(compression: str, model: Any, args: Any, copied: dict[str, int]) -> list[Any]:
    """Rows of experts in int8 or int4, which rounds the model's; adds what a pass copies."""
    start = time.monotonic()
    offloaded = offload_experts(
        model, "cuda", slots=args.slots, compression=compression, chunk_sequences=args.chunk
    )
    held = offloaded.host_bytes / 1e9
    print(
        f"{compression} in {time.monotonic() - start:.1f} s, {held:.1f} GB on the host", flush=True
    )
    copied[compression] = offloaded.host_bytes
    rows = measure(compression, model, args, max(args.tokens))
    if args.generate:
        generate(compression, model, args, offloaded, on_host=args.host_cache)
    return rows  # without restoring the weights, which would take their memory of before


def generate(
    name: str,
    model: Any,
    args: argparse.Namespace,
    offloaded: Any = None,
    *,
    on_host: bool = False,
) -> None:
    """Prints milliseconds of a greedy step, the mean of --generate, and what it copies."""
    for sequences in args.sequences:
        generator = torch.Generator().manual_seed(1)
        shape = (sequences, args.seq_len)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator).cuda()
        seconds, copied = [], []
        cache = HostCache(model.config, args.seq_len + 1 + args.generate) if on_host else None
        options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        torch.cuda.reset_peak_memory_stats()
        for new in (1, 1, 1 + args.generate):
            before = 0 if offloaded is None else offloaded.statistics.copied
            torch.cuda.synchronize()
            if cache is not None:
                cache.reset()
            start = time.monotonic()
            model.generate(
                ids,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
                **options,
            )
            torch.cuda.synchronize()
            seconds.append(time.monotonic() - start)
            copied.append(0 if offloaded is None else offloaded.statistics.copied - before)
        ms = 1000 * (seconds[2] - seconds[1]) / args.generate
        row: dict[str, Any] = {
            "row": f"{name}, generates",
            "sequences": sequences,
            "ms_per_step": round(ms, 1),
            "tokens_per_s": round(1000 * sequences / ms, 1),
            "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }
        if offloaded is not None:
            row["GB_per_step"] = round((copied[2] - copied[1]) / args.generate / 1e9, 2)
            found, missed = offloaded.statistics.expert_hits, offloaded.statistics.expert_misses
            row["hits_so_far"] = round(found / max(1, found + missed), 3)
        print(json.dumps(row), flush=True)


def link_rate() -> float:
    """GB/s from pinned host memory."""
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device="cuda")
    times, _ = timed(lambda: there.copy_(host, non_blocking=True)[0], 5)
    return host.numel() / statistics.median(times) / 1e6


def main() -> int:
    """Measures all ways, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--gpu-memory", default="24GB")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--groups", type=int, default=1, help="of a layer's experts, one a slot")
    parser.add_argument("--chunk", type=int, help="sequences that blocks compute at a time")
    parser.add_argument("--host-cache", action="store_true", help="keys and values on the host")
    parser.add_argument("--generate", type=int, default=0, help="steps of generation to time")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--expert-cache", default="4GB", help="of a second run of --generate")
    parser.add_argument("--compression", choices=["int8", "int4"], help="a row of it, too")
    parser.add_argument("--peers", action="store_true", help="Accelerate, too")
    parser.add_argument("--peer-tokens", type=int, default=32768, help="its largest pass")
    args = parser.parse_args()
    if args.compression and args.peers:
        parser.error("--compression leaves rounded weights: measure --peers in a run of its own")
    torch.set_grad_enabled(False)
    rate = link_rate()
    start = time.monotonic()
    model = build(args.model, args.layers)
    print(f"built in {time.monotonic() - start:.1f} s; link {rate:.1f} GB/s", flush=True)

    host = {name: parameter.data for name, parameter in model.named_parameters()}
    model.cuda()
    chunks = None if args.chunk is None else ChunkedBlocks(model, args.chunk, nullcontext)
    rows = measure("resident", model, args, max(args.tokens))
    if args.generate:
        try:
            generate("resident", model, args)
        except torch.OutOfMemoryError:
            print("resident, generates: out of memory", file=sys.stderr)
    if chunks is not None:
        chunks.close()
    for name, parameter in model.named_parameters():
        parameter.data = host[name]
    torch.cuda.empty_cache()

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(parse_bytes(args.gpu_memory) / total)
    start = time.monotonic()
    offloaded = offload_experts(
        model, "cuda", slots=args.slots, groups=args.groups, chunk_sequences=args.chunk
    )
    print(f"offloaded in {time.monotonic() - start:.1f} s", flush=True)
    rows += measure("offloaded", model, args, max(args.tokens))
    if args.generate:
        generate("offloaded", model, args, offloaded, on_host=args.host_cache)
    copied = {"offloaded": offloaded.host_bytes}
    offloaded.close()
    if args.generate:
        cache = args.expert_cache
        options = {"slots": args.slots, "groups": args.groups, "expert_cache": cache}
        options["chunk_sequences"] = args.chunk
        offloaded = offload_experts(model, "cuda", **options)
        generate(f"offloaded, {cache} of cache", model, args, offloaded, on_host=args.host_cache)
        offloaded.close()
    if args.compression:
        host.clear()  # the exact weights must not stay beside the compressed ones
        rows += compressed(args.compression, model, args, copied)

    if args.peers:
        from accelerate import cpu_offload

        for name, parameter in model.named_parameters():
            parameter.data = host[name]
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
        cpu_offload(model, torch.device("cuda"))
        rows += measure("Accelerate", model, args, args.peer_tokens)

    right = {row["tokens"]: row for row in rows if row["row"] == "resident"}
    print("| | tokens | ms | tokens/s | of resident | of the link's rate | peak GB |")
    print("|---|---|---|---|---|---|---|")
    same = True
    for row in rows:
        share = right[row["tokens"]]["ms"] / row["ms"] if row["tokens"] in right else 0.0
        link = copied.get(row["row"], 0) / row["ms"] / 1e6 / rate
        print(
            f"| {row['row']} | {row['tokens']} | {row['ms']} | {row['tokens_per_s']:,} |"
            f" {share:.2f} | {link:.2f} | {row['peak_GB']} |"
        )
        if row["row"] == "offloaded" and row["tokens"] in right:
            difference = abs(row["loss"] - right[row["tokens"]]["loss"])
            same &= difference <= (0.0 if args.groups == 1 else 1e-4)
    for row in rows:
        if row["row"] == args.compression and row["tokens"] in right:
            loss = right[row["tokens"]]["loss"]
            print(f"{row['row']}, {row['tokens']} tokens: loss {row['loss']:.6f}, exact {loss:.6f}")
    if not same:
        print("Losses differ from the resident model's: no comparison.", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
