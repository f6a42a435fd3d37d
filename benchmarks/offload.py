"""Scoring with experts in host memory, beside the same model on the GPU as a whole.

    python benchmarks/offload.py
    python benchmarks/offload.py --model mixtral-8x7b
    python benchmarks/offload.py --rows resident offloaded accelerate zero-inference

A model of the sizes of --model, bf16, with random weights, scores sequences of --seq-len tokens: a
pass is the hidden states of --tokens tokens and their loss, whose logits are computed in chunks.
The offloaded rows may use --gpu-memory, enforced by torch; the resident one all of it. Times are by
CUDA events from the end of one pass to the end of the next, medians of --passes after one. Losses
must have the same bits; with --groups they must be within 1e-4. With --chunk rows compute blocks
in chunks of so many sequences. --generate adds steps of greedy generation for each number of
--sequences, by transformers' generate, with the bytes that a step copies, and once more with
--expert-cache; --prefill splits the prompts. Texts are not compared: torch's attention with a cache
gives other bits each time, also with the resident model. With random weights, how often a step
chooses the experts of the one before says little of a trained model. --host-cache keeps keys and
values of the offloaded rows in host memory. --compression adds a row for experts in int8 or int4,
whose losses differ by what is printed; with random weights that says nothing about a trained model.
Two of --rows are peers, around transformers' own experts: "accelerate" is its cpu_offload, and
"zero-inference" DeepSpeed's. They get passes of --peer-tokens, and the second generates for
--peer-sequences, until --gpu-memory doesn't suffice, after which DeepSpeed can't go on.

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
from functools import partial
from typing import Any

import torch
from offloading.models import MODELS, build, device
from offloading.peers import Scorer, accelerate_offload, zero_inference
from torch import Tensor

from lightning_fastmoe.huggingface import HostCache
from lightning_fastmoe.huggingface.scoring import chunked_loss
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.chunks import ChunkedBlocks
from lightning_fastmoe.planning.offload_sizes import parse_bytes


def score(model: Any, ids: Tensor) -> Tensor:
    """The mean loss of the next token."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return chunked_loss(model, hidden, ids)


def measure(
    name: str,
    model: Any,
    args: argparse.Namespace,
    sizes: list[int],
    scorer: Callable[[Tensor], Tensor] | None = None,
) -> list[Any]:
    """Rows of one way, with passes of ``sizes`` tokens, which grow."""
    rows = []
    for tokens in sizes:
        generator = torch.Generator().manual_seed(tokens)
        shape = (tokens // args.seq_len, args.seq_len)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator).cuda()
        work = partial(score, model, ids) if scorer is None else partial(scorer, ids)
        torch.cuda.reset_peak_memory_stats()
        try:
            times, loss = timed(work, args.passes)
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


def generate(
    name: str,
    model: Any,
    args: argparse.Namespace,
    batches: list[int],
    offloaded: Any = None,
    *,
    on_host: bool = False,
) -> bool:
    """Prints milliseconds of a greedy step, the mean of --generate, and what it copies.

    Returns:
        Whether memory sufficed for all of ``batches``.
    """
    for sequences in batches:
        try:
            row = generated(model, args, sequences, offloaded, on_host)
        except torch.OutOfMemoryError:
            print(f"{name}, generates {sequences}: out of memory", file=sys.stderr)
            return False
        print(json.dumps({"row": f"{name}, generates", "sequences": sequences, **row}), flush=True)
    return True


def generated(
    model: Any, args: argparse.Namespace, sequences: int, offloaded: Any, on_host: bool
) -> dict[str, float]:
    """What :func:`generate` prints of one batch."""
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
            prefill_chunk_size=args.prefill,
            **options,
        )
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
        copied.append(0 if offloaded is None else offloaded.statistics.copied - before)
    ms = 1000 * (seconds[2] - seconds[1]) / args.generate
    row = {
        "ms_of_prompt": round(1000 * seconds[1], 1),
        "ms_per_step": round(ms, 1),
        "tokens_per_s": round(1000 * sequences / ms, 1),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }
    if offloaded is not None:
        row["GB_per_step"] = round((copied[2] - copied[1]) / args.generate / 1e9, 2)
        found, missed = offloaded.statistics.expert_hits, offloaded.statistics.expert_misses
        row["hits_so_far"] = round(found / max(1, found + missed), 3)
    return row


def accelerate(model: Any, args: argparse.Namespace) -> list[Any]:
    """Rows of Accelerate."""
    model.set_experts_implementation("grouped_mm")
    scorer = Scorer(model).eval()
    with accelerate_offload(scorer, device()):
        return measure("Accelerate", model, args, args.peer_tokens, scorer)


def zero(model: Any, args: argparse.Namespace) -> list[Any]:
    """Rows of ZeRO-Inference; ``model`` is of no use afterwards."""
    model.set_experts_implementation("grouped_mm")
    start = time.monotonic()
    if args.generate:
        with zero_inference(model, device()):
            fits = generate("ZeRO-Inference", model, args, args.peer_sequences)
        if not fits:
            return []
    scorer = Scorer(model).eval()
    with zero_inference(scorer, device()):
        print(f"ZeRO-Inference after {time.monotonic() - start:.1f} s", flush=True)
        return measure("ZeRO-Inference", model, args, args.peer_tokens, scorer)


def link_rate() -> float:
    """GB/s from pinned host memory."""
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device="cuda")
    times, _ = timed(lambda: there.copy_(host, non_blocking=True)[0], 5)
    return host.numel() / statistics.median(times) / 1e6


def offloaded(
    model: Any, args: argparse.Namespace, copied: dict[str, int], compression: str | None = None
) -> list[Any]:
    """Rows of experts in host memory, exact or in int8 or int4; adds what a pass copies."""
    name = compression or "offloaded"
    start = time.monotonic()
    options = {"slots": args.slots, "groups": args.groups, "chunk_sequences": args.chunk}
    made = offload_experts(model, "cuda", compression=compression, **options)
    held = made.host_bytes / 1e9
    print(f"{name} in {time.monotonic() - start:.1f} s, {held:.1f} GB on the host", flush=True)
    copied[name] = made.host_bytes
    rows = measure(name, model, args, args.tokens)
    if args.generate:
        generate(name, model, args, args.sequences, made, on_host=args.host_cache)
    if compression is not None:
        return rows  # without restoring the weights, which would take their memory of before
    made.close()
    if args.generate and args.expert_cache:
        name = f"offloaded, {args.expert_cache} of cache"
        made = offload_experts(model, "cuda", expert_cache=args.expert_cache, **options)
        generate(name, model, args, args.sequences, made, on_host=args.host_cache)
        made.close()
    return rows


def resident(model: Any, args: argparse.Namespace) -> list[Any]:
    """Rows of the model on the GPU; leaves it there."""
    model.cuda()
    chunks = None if args.chunk is None else ChunkedBlocks(model, args.chunk, nullcontext)
    rows = measure("resident", model, args, args.tokens)
    if args.generate:
        generate("resident", model, args, args.sequences)
    if chunks is not None:
        chunks.close()
    return rows


ROWS = ("resident", "offloaded", "accelerate", "zero-inference")


def main() -> int:
    """Measures all ways, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS[:2]))
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--gpu-memory", default="24GB")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--groups", type=int, default=1, help="of a layer's experts, one a slot")
    parser.add_argument("--chunk", type=int, help="sequences that blocks compute at a time")
    parser.add_argument("--host-cache", action="store_true", help="keys and values on the host")
    parser.add_argument("--generate", type=int, default=0, help="steps of generation to time")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4, 64])
    parser.add_argument("--prefill", type=int, help="tokens of a prompt that blocks get at a time")
    parser.add_argument("--expert-cache", help="of a second run of --generate: 4GB")
    parser.add_argument("--compression", choices=["int8", "int4"], help="a row of it, too")
    parser.add_argument("--peer-tokens", type=int, nargs="*", default=[32768, 65536, 131072])
    parser.add_argument("--peer-sequences", type=int, nargs="*", default=[64, 128, 192])
    args = parser.parse_args()
    if args.compression and {"accelerate", "zero-inference"} & {*args.rows}:
        parser.error("--compression leaves rounded weights: measure peers in a run of their own")
    torch.set_grad_enabled(False)
    rate = link_rate()
    start = time.monotonic()
    model = build(args.model, args.layers)
    print(f"built in {time.monotonic() - start:.1f} s; link {rate:.1f} GB/s", flush=True)

    rows: list[Any] = []
    copied: dict[str, int] = {}
    host = {name: parameter.data for name, parameter in model.named_parameters()}

    def restore() -> None:
        for name, parameter in model.named_parameters():
            parameter.data = host[name]
        torch.cuda.empty_cache()

    if "resident" in args.rows:
        rows += resident(model, args)
        restore()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(parse_bytes(args.gpu_memory) / total)
    if "offloaded" in args.rows:
        rows += offloaded(model, args, copied)
    if args.compression:
        host.clear()  # the exact weights must not stay beside the compressed ones
        rows += offloaded(model, args, copied, args.compression)
    else:
        restore()
    if "accelerate" in args.rows:
        rows += accelerate(model, args)
        torch.cuda.empty_cache()
    host.clear()  # ZeRO moves the weights to pinned memory
    if "zero-inference" in args.rows:
        rows += zero(model, args)

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
