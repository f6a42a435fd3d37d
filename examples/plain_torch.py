"""Expert parallelism in a loop of your own: a byte-level language model in plain PyTorch.

python examples/plain_torch.py                                 train in one process
torchrun --nproc-per-node 2 examples/plain_torch.py            half of the experts on each of two
torchrun --nproc-per-node 4 examples/plain_torch.py --resume   go on from the checkpoint, on four
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fastmoe import MoE
from lightning_fastmoe.distributed import ExpertDataParallel

WIDTH, HEADS, LENGTH = 64, 4, 64
MICRO_BATCHES, BATCH = 4, 4  # of each step, over all ranks; sequences in one


class Block(nn.Module):
    """Attention, then a mixture of experts where a feed-forward network was."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(d_model=WIDTH, d_ffn=WIDTH, num_experts=8, top_k=2)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        y = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


class LanguageModel(nn.Module):
    """Predicts each next byte. Nothing in it knows of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(LENGTH, device=text.device)
        x = self.embed(text[:, :-1]) + self.position(places)
        return F.cross_entropy(
            self.head(self.blocks(x)).flatten(0, 1).float(), text[:, 1:].flatten()
        )


def batch(text: Tensor, step: int, number: int) -> Tensor:
    """Micro-batch ``number`` of a step (BATCH, LENGTH + 1): the same on any number of ranks."""
    generator = torch.Generator().manual_seed(step * MICRO_BATCHES + number)
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()]).long()


def main() -> None:
    """Train, save and resume."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--text", default=argparse.__file__, help="a file to learn")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--save", default="runs/plain_torch.pt", help="the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else "cpu"
    if has_gpu:
        torch.cuda.set_device(device)  # before the process group: collectives use it
    if "RANK" in os.environ:  # torchrun started this process
        dist.init_process_group("nccl" if has_gpu else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    # Every rank builds the whole model, and keeps its share of the experts. The optimizer comes
    # after that: it must not see experts that live elsewhere.
    torch.manual_seed(0)
    model = LanguageModel().to(device)
    parallel = ExpertDataParallel(model, expert_parallel_size="auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    start = 0
    if args.resume:  # each rank takes its own experts from a file of the whole model
        saved = torch.load(args.save, mmap=True, weights_only=True)
        parallel.load_full_state_dict(saved["model"])
        parallel.load_full_optimizer_state_dict(optimizer, saved["optimizer"])
        start = saved["step"]

    text = torch.frombuffer(bytearray(Path(args.text).read_bytes()), dtype=torch.uint8)
    numbers = range(rank, MICRO_BATCHES, world)  # this rank's micro-batches
    if len(numbers) * world != MICRO_BATCHES:
        raise SystemExit(f"{world} ranks can't share {MICRO_BATCHES} micro-batches: use 1, 2 or 4.")
    for step in range(start, args.max_steps):
        mean = torch.zeros((), device=device)
        for number in numbers:
            with torch.autocast("cuda", torch.bfloat16, enabled=has_gpu):
                loss = model(batch(text, step, number).to(device))
            # In place of (loss / 4).backward(), as balancing losses need to know the 4, too.
            parallel.backward(loss, divisor=len(numbers))
            mean += loss.detach() / len(numbers)
        parallel.reduce_gradients()  # once, when all of the step's gradients have added up
        norm = parallel.clip_grad_norm_(1.0)  # the same number on every rank
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}  loss {mean / world:.6f}  norm {norm:.6f}", flush=True)

    # Every rank sends its experts; rank 0 has the whole model then, and the others {}.
    state = {"model": parallel.full_state_dict(), "step": max(start, args.max_steps)}
    state["optimizer"] = parallel.full_optimizer_state_dict(optimizer)
    if rank == 0:
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, f"{args.save}.part")
        os.replace(f"{args.save}.part", args.save)  # complete, or not there
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
