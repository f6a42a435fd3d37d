"""Layers inside the graphs of ``torch.compile``, without asking for ``fullgraph=True``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.collect import moe_layers


def trace_layers(model: nn.Module) -> None:
    """Makes ``torch.compile`` take the MoE layers of a model into its graphs where it can.

    Without this or ``fullgraph=True`` the graph breaks at each of them, which takes the host
    longer. Where a layer can't be traced, at ZeRO stage 3 for example, the graph breaks
    nonetheless; so it does where :class:`~lightning_fastmoe.SparseUpdate` trains single experts,
    and where a router or experts have hooks, also those that are added later.

    Everything that holds with ``fullgraph=True`` holds for a traced layer. The losses of its passes
    are added automatically, and :func:`~lightning_fastmoe.moe_losses` can't return them.

    Args:
        model: with any number of :class:`~lightning_fastmoe.nn.MoE` layers, before its first pass.
    """
    for _, layer in moe_layers(model):
        layer.is_traced = True


def compile_blocks(blocks: Iterable[nn.Module], *, cuda_graphs: bool = False) -> None:
    """Compiles each block of a model, and takes its MoE layers into the graph where it can.

    Blocks that differ in their weights alone are compiled once.

    Args:
        blocks: before their first pass.
        cuda_graphs: whether what is compiled is launched as CUDA graphs, which takes the host less
            time. All batches should have one shape, since each is recorded by itself, and no tensor
            of a pass may be kept beyond its step. ``FastMoEStrategy`` says where steps begin; a
            loop of your own calls :func:`torch.compiler.cudagraph_mark_step_begin` there.
    """
    for block in blocks:
        trace_layers(block)
        if cuda_graphs:
            block.compile(mode="reduce-overhead")
        else:
            block.compile()


def check_cuda_graphs(cuda_graphs: bool, compiles: bool | None) -> None:
    """Checks two arguments of models.

    Raises:
        ConfigError: for CUDA graphs of blocks that are not to be compiled.
    """
    if cuda_graphs and compiles is False:
        raise ConfigError("cuda_graphs=True has no effect without compile=True.")
