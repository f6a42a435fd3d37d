"""Soak test for hangs and leaks: many cold starts, and one long run with changing load.

    python benchmarks/soak.py starts --mode strategy --count 60 --parallel 3
    python benchmarks/soak.py starts --mode compiled --count 60 --parallel 3
    python benchmarks/soak.py starts --mode strategy --gpus 2 --count 20
    python benchmarks/soak.py steps --steps 20000

``starts`` trains the network of ``examples/gpu_lm.yaml`` for a few steps, each time in a new
process with a CUDA context of its own (forked from one that has imported everything): by
FastMoEStrategy with a checkpoint at the end ("strategy"), or in a plain loop, compiled ("compiled")
or not ("plain"). Every third start has one core, so that the device waits for the host. ``steps``
trains a small model by FastMoEStrategy while routing goes from even to all tokens on one expert and
back, experts die, sequence lengths change, with validation in between and checkpoints in the
background.

Prints a line of JSON. For ``starts``: how many hung (had not ended after --limit seconds, or one of
our kernels timed out), and whether the losses of all starts are bitwise equal. For ``steps``: how
memory, threads and file descriptors developed. The exit status is 1 if anything hung, failed,
differed or grew.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

STALLED = "stood still"  # what the report of a kernel that gave up says
ONE_CORE_EVERY = 3
SAMPLE_EVERY = 500


# ------------------------------------------------------------------------------- what a start runs


def network_arguments() -> dict[str, Any]:
    """The sizes of examples/gpu_lm.yaml; not compiled."""
    import yaml

    path = Path(__file__).resolve().parents[1] / "examples" / "gpu_lm.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**settings["model"], "compile": False, "seq_len": settings["data"]["seq_len"]}


def train_by_strategy(steps: int, world: int, scratch: Path, deterministic: bool) -> list[str]:
    """Returns the losses of ``steps`` steps, as hexadecimal numbers."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    from lightning_fastmoe import FastMoEStrategy
    from lightning_fastmoe.demos.byte_lm import ByteCorpus, MoELanguageModel
    from lightning_fastmoe.demos.byte_lm.cli import silence_upstream

    class Losses(pl.Callback):
        def __init__(self) -> None:
            self.values: list[Any] = []

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, *args: Any, **kwargs: Any
        ) -> None:
            self.values.append(outputs["loss"].detach().float())

    silence_upstream()
    pl.seed_everything(0, verbose=False)
    arguments = network_arguments()
    seq_len = arguments.pop("seq_len")
    losses = Losses()
    checkpoint = ModelCheckpoint(
        scratch / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=steps
    )
    trainer = pl.Trainer(
        accelerator="cuda",
        devices=world,
        precision="bf16-mixed",
        strategy=FastMoEStrategy(expert_parallel_size="auto", stage=2),
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        deterministic=deterministic,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, checkpoint],
        default_root_dir=scratch,
    )
    trainer.fit(MoELanguageModel(**arguments), ByteCorpus(seq_len=seq_len, batch_size=16))
    return [value.item().hex() for value in losses.values]


def train_in_a_loop(steps: int, compiled: bool, deterministic: bool) -> list[str]:
    """Trains the same network without Lightning: autocast, fused AdamW, clipping."""
    import torch
    import torch.nn.functional as F

    from lightning_fastmoe.demos.byte_lm.model import MoETransformer

    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(0)
    arguments = network_arguments()
    seq_len = arguments.pop("seq_len")
    lr = arguments.pop("lr")
    for other in ("warmup_steps", "compile"):
        arguments.pop(other)
    usual = {"router": "softmax", "load_balancing": None, "z_loss": None, "moe": None}
    with torch.device("cuda"):
        network = MoETransformer(**{**usual, **arguments})
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    run = torch.compile(network) if compiled else network
    print("built", flush=True)
    windows = torch.randint(256, (4, 16, seq_len + 1), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        batch = windows[step % len(windows)].cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = run(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        print(f"launched step {step}", flush=True)
    return [value.item().hex() for value in losses]


def start(args: argparse.Namespace, rank: int, port: int, folder: str, core: int) -> None:
    """One rank of a start: trains, and writes its losses or its error into ``folder``."""
    import torch

    place = Path(folder)
    log = os.open(place / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if core >= 0:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(core + rank) % len(cores)]})
        # As many threads as the machine has cores would wait for each other by spinning on one.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        torch.set_num_threads(1)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    world = args.gpus
    if world > 1:
        os.environ.update(
            {
                "TORCHELASTIC_RUN_ID": "soak",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
            }
        )
    try:
        if args.mode == "strategy":
            losses = train_by_strategy(args.steps, world, place, args.deterministic)
        else:
            losses = train_in_a_loop(args.steps, args.mode == "compiled", args.deterministic)
        (place / f"losses.{rank}").write_text(json.dumps(losses))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()


# ------------------------------------------------------------------------------------- cold starts


def free_port() -> int:
    """A free port, chosen by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def one_start(context: Any, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs start ``number`` on all its ranks, and returns its outcome."""
    folder = tempfile.mkdtemp(prefix=f"soak-{number}-", dir=args.scratch)
    port = free_port()
    core = number if number % ONE_CORE_EVERY == ONE_CORE_EVERY - 1 else -1
    begun = time.monotonic()
    ranks = [
        context.Process(target=start, args=(args, rank, port, folder, core))
        for rank in range(args.gpus)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(0.1, begun + args.limit - time.monotonic()))
    hung = any(process.is_alive() for process in ranks)
    for process in ranks:
        process.kill()
        process.join()
    logs = "\n".join(path.read_text(errors="replace") for path in Path(folder).glob("log.*"))
    losses = [path.read_text() for path in sorted(Path(folder).glob("losses.*"))]
    shutil.rmtree(folder, ignore_errors=True)
    if hung or STALLED in logs:
        outcome = "hung"
    elif "torch.OutOfMemoryError" in logs:
        outcome = "out of memory"  # too many side by side
    elif any(process.exitcode for process in ranks) or len(losses) < args.gpus:
        outcome = "failed"
    else:
        outcome = "ended"
    seconds = round(time.monotonic() - begun, 1)
    if outcome != "ended":
        print(f"start {number}: {outcome} after {seconds} s\n{logs[-2000:]}", file=sys.stderr)
    return {"outcome": outcome, "losses": losses, "seconds": seconds, "one_core": core >= 0}


def cold_starts(args: argparse.Namespace) -> bool:
    """Runs all starts and prints a summary. True if all succeeded with equal losses."""
    # Check by NVML: a library that looks for GPUs on import would break CUDA in all forks.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lightning_fastmoe.demos.byte_lm.cli", "torch._inductor.compile_fx", "yaml"]
    )
    last = time.monotonic() + args.within

    def one(number: int) -> dict[str, Any] | None:
        return one_start(context, number, args) if time.monotonic() < last else None

    with ThreadPoolExecutor(args.parallel) as pool:
        found = [done for done in pool.map(one, range(args.count)) if done is not None]
    outcomes = Counter(one["outcome"] for one in found)
    losses = Counter(tuple(one["losses"]) for one in found if one["outcome"] == "ended")
    report = {
        "mode": args.mode,
        "gpus": args.gpus,
        "starts": len(found),
        "parallel": args.parallel,
        **{name: outcomes[name] for name in ("ended", "hung", "failed", "out of memory")},
        "different_losses": len(losses),
        "last_losses": sorted(
            {float.fromhex(json.loads(text)[-1]) for texts in losses for text in texts}
        ),
        "seconds": [one["seconds"] for one in found],
        **machine(),
    }
    print(json.dumps(report), flush=True)
    same = len(losses) == 1 or not args.deterministic
    return outcomes["ended"] == len(found) > 0 and same


def machine() -> dict[str, Any]:
    """The device and the versions that a result depends on."""
    import deepspeed
    import pytorch_lightning as pl
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
        "deepspeed": deepspeed.__version__,
    }


# ------------------------------------------------------------------------------------ one long run


def pressure(step: int, experts: int) -> list[float]:
    """Bias on the experts' logits at a step: even, all on one expert, dead experts, and back."""
    place, cycle = step % 1000, step // 1000
    added = [0.0] * experts
    if place < 500:  # towards one expert and back
        added[cycle % experts] = 40.0 * math.sin(math.pi * place / 500) ** 2
    elif place < 750:  # half of them are dead
        for expert in range(cycle % 2, experts, 2):
            added[expert] = -1e4
    return added


def resources() -> dict[str, float]:
    """The resources in which a leak would show."""
    import psutil
    import torch

    process = psutil.Process()
    found = {
        "host_MiB": process.memory_info().rss / 2**20,
        "threads": float(process.num_threads()),
        "descriptors": float(process.num_fds()),
    }
    if torch.cuda.is_available():
        found["device_MiB"] = torch.cuda.memory_allocated() / 2**20
        found["reserved_MiB"] = torch.cuda.memory_reserved() / 2**20
    return found


def long_run(args: argparse.Namespace) -> bool:
    """Trains, and prints the resources of the second quarter and of the end. True if they agree."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint
    from torch import nn

    from lightning_fastmoe import FastMoEStrategy, MoE
    from lightning_fastmoe.demos.byte_lm.cli import silence_upstream
    from lightning_fastmoe.nn.router import SoftmaxTopKRouter

    experts, d_model = 16, 256

    class PushedRouter(SoftmaxTopKRouter):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.register_buffer("push", torch.zeros(experts), persistent=False)

        def logits(self, x: Any) -> Any:
            return super().logits(x) + self.push

    class Windows(torch.utils.data.Dataset[Any]):
        """Batches of random bytes, each with a different length."""

        def __init__(self, batches: int) -> None:
            self.batches = batches

        def __len__(self) -> int:
            return self.batches

        def __getitem__(self, index: int) -> Any:
            generator = torch.Generator().manual_seed(index)
            length = (2, 33, 128, 257, 512)[index % 5]
            return torch.randint(256, (8, length), generator=generator)

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(256, d_model)
            self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(4))
            self.layers = nn.ModuleList(
                MoE(d_model, 256, experts, 2, router=PushedRouter) for _ in range(4)
            )
            self.readout = nn.Linear(d_model, 256)

        def loss(self, batch: Any) -> Any:
            x = self.embedding(batch[:, :-1])
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = x + layer(norm(x))
            logits = self.readout(x).float().flatten(0, 1)
            return nn.functional.cross_entropy(logits, batch[:, 1:].flatten())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            added = torch.tensor(pressure(self.global_step, experts))
            for layer in self.layers:
                layer.router.push.copy_(added)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Sampler(pl.Callback):
        def __init__(self) -> None:
            self.samples: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *rest: Any, **kwargs: Any) -> None:
            # Half-way between two checkpoints, whose threads are done by then.
            if trainer.global_step % SAMPLE_EVERY == SAMPLE_EVERY // 2:
                self.samples.append({"step": trainer.global_step, **resources()})
                print(self.samples[-1], file=sys.stderr, flush=True)

    silence_upstream()
    pl.seed_everything(0, verbose=False)
    sampler = Sampler()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        trainer = pl.Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=1,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
            strategy=FastMoEStrategy(stage=2, async_checkpoint=True),
            max_steps=args.steps,
            max_time=timedelta(seconds=args.within) if args.within < math.inf else None,
            val_check_interval=SAMPLE_EVERY,
            check_val_every_n_epoch=None,
            limit_val_batches=5,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                sampler,
                ModelCheckpoint(
                    scratch, save_last=True, save_top_k=0, every_n_train_steps=SAMPLE_EVERY
                ),
            ],
            default_root_dir=scratch,
        )
        loader = torch.utils.data.DataLoader(Windows(10**6), batch_size=None)
        begun = time.monotonic()
        trainer.fit(Model(), loader, torch.utils.data.DataLoader(Windows(5), batch_size=None))
    early, late = halves(sampler.samples)
    grown = {name: [early[name], late[name]] for name in early if late[name] > early[name] * 1.02}
    report = {
        "steps": trainer.global_step,
        "seconds": round(time.monotonic() - begun, 1),
        "early": early,
        "late": late,
        "grown": grown,
        **machine(),
    }
    print(json.dumps(report), flush=True)
    return (trainer.global_step == args.steps or args.within < math.inf) and not grown


def halves(samples: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Maximum of each resource in the second quarter of the samples, and in the second half."""
    count = len(samples)
    if count < 8:
        raise SystemExit(f"{count} samples are too few; --steps must be {8 * SAMPLE_EVERY} or more")
    quarter, half = samples[count // 4 : count // 2], samples[count // 2 :]
    names = samples[0].keys() - {"step"}

    def most(part: list[dict[str, float]]) -> dict[str, float]:
        return {name: round(max(one[name] for one in part), 1) for name in sorted(names)}

    return most(quarter), most(half)


def main() -> None:
    """Runs the chosen command; exits with 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scratch", help="where checkpoints go while they are needed")
    commands = parser.add_subparsers(dest="command", required=True)
    starts = commands.add_parser("starts", help="many cold starts")
    starts.add_argument("--mode", choices=("strategy", "compiled", "plain"), default="strategy")
    starts.add_argument("--count", type=int, default=60)
    starts.add_argument(
        "--within", type=float, default=math.inf, help="seconds after which no more are started"
    )
    starts.add_argument("--steps", type=int, default=20)
    starts.add_argument("--gpus", type=int, default=1, help="ranks of a start (strategy alone)")
    starts.add_argument("--parallel", type=int, default=1, help="starts that share the GPUs")
    starts.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch's deterministic algorithms, by which all starts have the same losses",
    )
    starts.add_argument("--limit", type=float, default=180.0, help="seconds after which one hangs")
    steps = commands.add_parser("steps", help="one long run")
    steps.add_argument("--steps", type=int, default=20000)
    steps.add_argument("--within", type=float, default=math.inf, help="seconds to end it after")
    args = parser.parse_args()
    if args.command == "starts" and args.gpus > 1 and args.mode != "strategy":
        parser.error("--gpus needs --mode strategy")
    sys.exit(0 if (cold_starts if args.command == "starts" else long_run)(args) else 1)


if __name__ == "__main__":
    main()
