"""Where the ranks of a test compute: over gloo on the CPU, or over NCCL on GPUs that they share."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from lightning_fastmoe.distributed import ExpertGroup, make_node_groups


def join(device_type: str) -> tuple[torch.device, ExpertGroup]:
    """Joins the other ranks; this rank's device, and the group of all.

    NCCL refuses two ranks on one GPU of a host, and torch's symmetric memory does too, unless told
    otherwise. Where there are fewer GPUs than ranks, each rank says that it is another host.
    """
    device = torch.device("cpu")
    if device_type == "cuda":
        rank = dist.get_node_local_rank()
        if torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
            os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"
            os.environ["NCCL_SOCKET_IFNAME"] = "lo"
            os.environ["NCCL_IB_DISABLE"] = "1"
            os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device_type == "cpu" else "nccl")
    return device, whole_group()


def node_of_each_rank() -> list[int]:
    """As the pool has been told."""
    return [rank // int(os.environ["LOCAL_WORLD_SIZE"]) for rank in range(dist.get_world_size())]


def whole_group() -> ExpertGroup:
    """All ranks, with the parts that their nodes make."""
    assert dist.group.WORLD is not None
    nodes = node_of_each_rank()
    return ExpertGroup(dist.group.WORLD, make_node_groups([list(range(len(nodes)))], nodes))
