"""What a rank computes for test_offload.py. DeepSpeed has one accelerator per process: the CPU."""

from __future__ import annotations

from typing import Any

import torch
from offloading import peers
from offloading.models import build
from torch import Tensor

from lightning_fastmoe.huggingface import causal_lm_loss


@torch.no_grad()
def losses_and_texts() -> dict[str, Any]:
    """The loss and the greedy continuation of four sequences, by each system."""
    peers.RESIDENT, peers.GATHERED = 100, 5000  # small weights, too, are fetched and given up
    device = torch.device("cpu")
    model: Any = build("tiny")
    model.lm_head.weight.mul_(20)  # logits of about one, so that the loss tells tokens apart
    ids = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))

    def text() -> Tensor:
        made: Tensor = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        return made

    found: dict[str, Any] = {}
    found["ours"] = [causal_lm_loss(model, ids, input_ids=ids), text()]
    model.set_experts_implementation("grouped_mm")
    scorer = peers.Scorer(model).eval()
    with peers.accelerate_offload(scorer, device):
        found["Accelerate"] = [scorer(ids), text()]
    found["after it"] = [scorer(ids), text()]
    with peers.zero_inference(model, device):
        texts = [text() for _ in range(2)]  # the second with weights fetched ahead
    with peers.zero_inference(scorer, device):
        found["held"] = sum(p.numel() for p in model.parameters())
        first, second = scorer(ids), scorer(ids)
    found["ZeRO"], found["ZeRO again"] = [first, texts[0]], [second, texts[1]]
    return found
