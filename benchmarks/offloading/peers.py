"""Other systems that compute with models that don't fit on the GPU, each as its manual says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fastmoe.huggingface.scoring import ROWS
from lightning_fastmoe.testing.ranks import free_port

GATHERED = 1_400_000_000
"""Weights that ZeRO may hold on the GPU at a time: two layers of Qwen3-30B-A3B with all experts."""

RESIDENT = 20_000_000
"""Weights up to this size stay on the GPU under ZeRO: all but experts, embedding and head."""


class LossHead(nn.Linear):
    """A head that can compute the loss, too, so that its weight is fetched once for that."""

    @classmethod
    def of(cls, head: nn.Linear) -> LossHead:
        """One with the weight of ``head``."""
        with torch.device("meta"):
            made = cls(head.in_features, head.out_features, bias=False)
        made.weight = head.weight
        return made

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits; with ``labels (B, S)`` the mean loss of the next token."""
        if labels is None:
            return super().forward(hidden)
        rows = hidden[:, :-1].flatten(0, 1).split(ROWS)
        wanted = labels[:, 1:].flatten().split(ROWS)
        total = torch.zeros((), device=hidden.device)
        for some, targets in zip(rows, wanted, strict=True):
            logits = F.linear(some, self.weight).float()
            total += F.cross_entropy(logits, targets, reduction="sum")
        return total / labels[:, 1:].numel()


class Scorer(nn.Module):
    """The mean loss of the next token as a module, which is what peers attach their hooks to.

    Args:
        model: of transformers; gets a :class:`LossHead`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not isinstance(model.lm_head, LossHead):
            model.lm_head = LossHead.of(model.lm_head)
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of ``ids (B, S)``."""
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss: Tensor = self.model.lm_head(hidden, ids)
        return loss


@contextmanager
def accelerate_offload(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Accelerate's ``cpu_offload``: each module's weights are copied when it is called."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    weights = {name: parameter.data for name, parameter in root.named_parameters()}
    cpu_offload(root, device)
    try:
        yield
    finally:
        remove_hook_from_submodules(root)
        for name, weight in weights.items():
            owner, _, key = name.rpartition(".")
            root.get_submodule(owner)._parameters[key] = nn.Parameter(weight, requires_grad=False)


@contextmanager
def zero_inference(root: nn.Module, device: torch.device) -> Iterator[None]:
    """DeepSpeed's ZeRO-Inference: ZeRO 3 with weights in pinned host memory, fetched ahead.

    From the second pass on it knows in which order modules need their weights. All that is small
    stays on the GPU. The weights of ``root`` are moved, not copied; a second call takes them as the
    first left them.
    """
    import deepspeed

    from lightning_fastmoe.zero.config import select_accelerator

    select_accelerator(device)  # on the CPU DeepSpeed would compile an extension that nothing calls
    cuda = device.type == "cuda"
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:  # not started by a launcher
            alone = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
            os.environ.update(alone, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": cuda},
            "stage3_param_persistence_threshold": RESIDENT,
            "stage3_prefetch_bucket_size": GATHERED // 2,
            "stage3_max_live_parameters": GATHERED,
            "stage3_max_reuse_distance": 0,
        },
    }
    deepspeed.zero.Init(
        module=root,
        remote_device="cpu",
        pin_memory=cuda,
        config_dict_or_path=config,
        dtype=torch.bfloat16,
    )
    engine = deepspeed.initialize(model=root, config=config)[0]
    try:
        yield
    finally:
        engine.destroy()
